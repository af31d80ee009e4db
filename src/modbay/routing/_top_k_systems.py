"""The mixtures of experts that TopK is, by its arguments: rows of the catalogue."""

from ..types import System

TEST = "tests/test_experts.py::"


def _row(numbers: tuple[int, ...], name: str, build: str, tests: tuple[str, ...], equation: str, source: str) -> System:
    return System(numbers, build, tuple(TEST + test for test in tests), name, equation, source, "4.2.3")


SYSTEMS = (
    _row(
        (98,),
        "Mixture of experts",
        "mb.TopK(None)",
        ("test_all_experts_weigh_by_the_softmax", "test_experts_that_compete_part_a_task_of_two_rules"),
        "y = Σ_i softmax(W x)_i f_i(x)",
        'Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts", 1991.',
    ),
    _row(
        (101,),
        "Noisy top-k",
        "mb.TopK(4, noise=True)",
        ("test_noisy_top_k_is_the_paper_s_equations", "test_noise_brings_its_losses"),
        "G = softmax(KeepTopK(W x + ε softplus(W_n x), k)), with importance and load losses",
        'Shazeer et al., "Outrageously Large Neural Networks", 2017 (arXiv 1701.06538).',
    ),
    _row(
        (102,),
        "GShard",
        "mb.TopK(2, second='random', capacity=1.0)",
        (
            "test_the_second_module_is_kept_in_proportion_to_its_weight",
            "test_a_capacity_drops_first_the_second_choices_and_then_the_latest_rows",
        ),
        "the second of two with probability min(1, 2 w_2), each module at most 2 rows/n rows",
        'Lepikhin et al., "GShard", 2020 (arXiv 2006.16668).',
    ),
    _row(
        (103,),
        "Switch",
        "mb.TopK(1, capacity=1.25, jitter=1e-2)",
        ("test_switch_s_capacity_drops_the_rows_beyond_it_in_order", "test_padding_takes_no_place"),
        "y = p_i f_i(x) of the likeliest i, each at most 1.25 rows/n rows, and 0.01 n Σ f_i P_i as a loss",
        'Fedus, Zoph and Shazeer, "Switch Transformers", 2021 (arXiv 2101.03961).',
    ),
    _row(
        (104,),
        "ST-MoE",
        "mb.TopK(2, z=1e-3, capacity=1.25)",
        ("test_the_z_loss_is_the_paper_s_and_pulls_logits_to_nought",),
        "top 2 of softmax(z), z = W x, with 0.001 mean log²(Σ_i exp z_i) as a loss",
        'Zoph et al., "ST-MoE", 2022 (arXiv 2202.08906).',
    ),
    _row(
        (109,),
        "V-MoE",
        "mb.TopK(2, renormalise=False, noise=1.0, capacity=1.05, priority=True)",
        ("test_v_moe_s_noise_and_losses", "test_priority_keeps_the_surest_rows"),
        "top k of softmax(W x + ε/n); full modules keep the rows with the highest p",
        'Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", 2021 (arXiv 2106.05974).',
    ),
    _row(
        (109,),
        "GLaM",
        "mb.TopK(2, capacity=1.25)",
        ("test_a_capacity_drops_first_the_second_choices_and_then_the_latest_rows",),
        "the two likeliest of 64 experts at p_i/(p_1 + p_2), with a capacity",
        'Du et al., "GLaM", 2021 (arXiv 2112.06905).',
    ),
    _row(
        (109,),
        "NLLB's mixture of experts",
        "mb.TopK(2, second='sampling', renormalise='after', capacity=1.0, drop=0.2)",
        ("test_masked_outputs_keep_their_expectation", "test_weights_sum_to_one_over_what_is_kept"),
        "GShard's routing, the second drawn by p, and expert output masking: a share of the choices left out",
        'NLLB Team, "No Language Left Behind", 2022 (arXiv 2207.04672).',
    ),
    System(
        (115,),
        "router=mb.TopK(1)",
        (
            "tests/test_routers.py::test_a_router_is_global_or_of_a_layer",
            "tests/test_routers.py::test_a_path_has_a_policy_for_each_site_on_the_same_input",
            "tests/test_hard.py::test_a_dispatcher_sends_rows_to_agents",
        ),
        "Level of routing",
        "one α for all sites; router=lambda: mb.TopK(1), one a site; mb.Policy(path=True), a path; mb.Dispatch, a tree",
        section="4.3",
    ),
)
