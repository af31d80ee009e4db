"""The errors of modbay: one root, and a branch for each thing that a user can get wrong.

ModbayError
├── MatchError              a pattern, type, predicate or role that matches nothing (or too much)
│   └── RoleError           a role that the model's structure does not answer without a guess
├── LabelError              labels: unknown, too few, too many, absent, or a name that the call owns
├── CompositionError        parts that do not fit: a kind under an aggregator, a routing at a site
├── BayError                the life of a bay: names, order of detaching, where and when to attach
├── SiteError               a site that never fired, or whose rows are not the batch
├── CallError               a second thread in the model, a recomputation that cannot be right
├── DataError               data to learn from: files, columns, rows, classes; every bad row with its file and line
├── ConfigError             what was asked of a run: an unknown method or argument, a base or folder that isn't there
├── Interrupted             Ctrl-C, after all was saved
├── MergeError              what is to be merged does not fit, or not as asked: names, shapes, weights, densities
├── ProofError              what was to stay bit for bit did not
└── FileError               what is on disk: truncated, extra, misshapen, not finite, not safetensors
    └── BaseMismatch        a module that was trained on another base
"""


class ModbayError(Exception):
    """The root of all errors that modbay raises on purpose."""


class MatchError(ModbayError, ValueError):
    """What `at` names is not in the model."""


class RoleError(MatchError):
    """A role has no certain answer in this model."""


class LabelError(ModbayError, ValueError):
    """The labels of a call do not say which modules to use."""


class CompositionError(ModbayError, TypeError):
    """Parts were put together that do not fit."""


class BayError(ModbayError, RuntimeError):
    """A verb was used on a bay, or on a model, that is not in the state for it."""


class SiteError(ModbayError, RuntimeError):
    """A site did not see what a site must see."""


class CallError(ModbayError, RuntimeError):
    """A forward pass that could only give wrong numbers."""


class DataError(ModbayError, ValueError):
    """Data that can't be learned from as it is: a file, a column, rows or classes."""


class ConfigError(ModbayError, ValueError):
    """What was asked of a run makes no sense, or names what is not there."""


class Interrupted(ModbayError):
    """The user stopped a run; what it had reached is saved."""


class MergeError(ModbayError, ValueError):
    """Models can't be merged as asked, or at all."""


class ProofError(ModbayError, RuntimeError):
    """What was to stay as it was, bit for bit, did not."""


class FileError(ModbayError, ValueError):
    """A file or folder is not a sound modbay module."""


class BaseMismatch(FileError):
    """A module was made for a base with other weights."""


def listed(names, most: int = 8) -> str:
    """`'a', 'b', 'c' … (12 in all)`: names as an error shows them."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} … ({len(names)} in all)"
