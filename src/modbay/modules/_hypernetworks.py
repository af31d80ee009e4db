"""The hypernetworks of the literature, each as mb.Hyper makes it: rows of the catalogue."""

from ..types import System

TESTS = "tests/test_hyper.py::test_"

HYPERNETWORKS = (
    System((56,), "mb.Hyper(mb.Full(), size=64)",
           (f"{TESTS}hypernetworks_make_the_weights_of_each_layer_of_its_embedding",),
           "static hypernetwork", source="Ha et al., 2017 (arXiv 1609.09106)"),
    System((57,), 'mb.Hyper(mb.Full(), "language", ("en", "de"), 8, where=(), shared=False, rank=4)',
           (f"{TESTS}contextual_parameters_are_grouped_and_of_low_rank",), "contextual parameter generation (CPG)",
           "φ_j = φ₀_j + W_j P_j e_language / √r, with W_j and P_j (r, d) one a tensor φ_j",
           "Platanios et al., 2018 (arXiv 1808.08493)"),
    System((58,), 'mb.Hyper(mb.Bottleneck(256), "language", table={"en": (0, 1), "de": (1, 0)}, raw=True, '
           'hidden=128, code=32, where=(), shared=False)',
           (f"{TESTS}adapters_of_a_language_are_made_of_its_features",), "UDapter",
           source="Üstün et al., 2020 (arXiv 2004.14327)"),
    System((59,), 'mb.Hyper(mb.Bottleneck(reduction=32, norm="after", activation="gelu_tanh"), "task", '
           '("nli", "qa"), 64, 128, 64, norm=True, where=("layer", "position"))',
           (f"{TESTS}one_hypernetwork_serves_all_layers_and_positions_with_conditional_norms",), "HyperFormer++",
           source="Mahabadi et al., 2021 (arXiv 2106.04489)"),
    System((60,), 'mb.Hyper(mb.Grid(8, 8), where=("input",), only=("row",))',
           (f"{TESTS}the_input_gates_the_blocks_of_a_weight_beside_what_all_share",), "HyperGrid",
           source="Tay et al., 2021 (arXiv 2007.05891)"),
    System((61,), 'mb.Hyper(mb.Prefix(16, bottleneck=32), "task", ("nli", "qa"), 64, 64, where=("layer",))',
           (f"{TESTS}prefixes_of_a_task_and_a_layer_are_made_by_one_hypernetwork",), "HyperPrompt",
           source="He et al., 2022 (arXiv 2203.00759)"),
    System((62,), 'mb.Hyper(mb.Bottleneck(reduction=2), "language", table={"en": (0, 1), "de": (1, 0)}, '
           'where=("layer",))',
           (f"{TESTS}features_are_projected_beside_the_embedding_of_the_layer",
            f"{TESTS}a_label_never_seen_is_told_by_its_features"),
           "MAD-G", source="Ansell et al., Findings of EMNLP 2021"),
    System((63,), 'mb.Hyper(mb.Bottleneck(256), ("task", "language"), (("nli", "qa"), ("en", "de")), 64, 192, 32, '
           'where=("layer",))', (f"{TESTS}task_language_and_layer_make_an_adapter_together",), "Hyper-X",
           source="Üstün et al., 2022 (arXiv 2205.12148)"),
    System((64,), '{mb.role.attention: mb.Hyper(mb.Prefix(30), "instruction", features=768), '
           'mb.role.ffn: mb.Hyper(mb.Bottleneck(512), "instruction", features=768)}',
           (f"{TESTS}an_encoded_instruction_makes_prefixes_and_adapters",), "HINT",
           source="Ivison et al., 2022 (arXiv 2212.10315)"),
    System((65,), 'mb.Hyper(mb.Bottleneck(64), "read", features=768, raw=True, size=10, hidden=128, '
           'where=("layer",))', (f"{TESTS}a_decoder_is_adapted_by_what_its_encoder_read",), "Hyperdecoders",
           source="Ivison and Peters, 2022 (arXiv 2203.08304)"),
    System((66,), 'mb.Hyper(mb.Bottleneck(norm=True), ("source", "target"), (("en", "de"), ("fi", "sw")), 50, 100, '
           'where=("layer",))', (f"{TESTS}task_language_and_layer_make_an_adapter_together",), "hyper-adapters",
           source="Baziotis et al., 2022 (arXiv 2205.10835)"),
    System((67,), 'mb.Hyper(mb.Head(("no", "yes")), ("task", "language"), (("nli", "qa"), ("en", "de")), 100, 400, '
           'where=(), kl=1e-4)', (f"{TESTS}task_and_language_are_latent_and_their_divergence_is_a_loss",),
           "parameter-space factorisation",
           "φ = φ₀ + W f(z_task ⊕ z_language) / √d, z ~ N(μ, σ²), with loss kl · KL(z ‖ N(0, 1))",
           "Ponti et al., 2021 (arXiv 2001.11453)"),
)  # fmt: skip
