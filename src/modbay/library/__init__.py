"""Modules as files: the format, the fingerprint of the base, reading and writing."""

from ._content import content as content
from ._doors import composed as composed
from ._doors import export as export
from ._fingerprint import fingerprint as fingerprint
from ._index import Entry as Entry
from ._library import Library as Library
from ._load import Plan as Plan
from ._load import load as load
from ._load import making as making
from ._load import plans as plans
from ._schema import json_schema as json_schema
from ._schema import schema_text as schema_text
from ._write import save as save
