"""T-Few: (IA)³ at an encoder-decoder, trained by three losses.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal and Raffel, 2022 (arXiv 2205.05638).
"""

from typing import Any

from ..abstract import Kind
from ..modules import IA3
from ..seams import role
from ..types import System, systems


@systems(
    System(
        (68,),
        "methods.t_few()",
        (
            "tests/test_networks.py::test_t_few_is_ia3_and_three_losses",
            "tests/test_networks.py::test_the_losses_of_t_few_are_written_out",
        ),
        "T-Few",
        "l_k ⊙ K, l_v ⊙ V and W_2 (l_ff ⊙ σ(W_1 x)), by L_LM + L_UL + L_LN",
    )
)
def t_few() -> dict[Any, Kind]:
    """l_k ⊙ K, l_v ⊙ V and W_2 (l_ff ⊙ σ(W_1 x)) as one module; its loss is `modbay.losses.t_few`.

        bay = mb.attach(t5, modules={"cb": methods.t_few()}, name="task")

    The paper: 1,000 steps of batches of 8, Adafactor at 3e-3, decayed linearly after 60 steps of warm-up.
    """
    return {role.key: IA3(), role.value: IA3(), role.ffn_out: IA3("input")}
