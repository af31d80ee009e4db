"""`modbay merge --explain`, `checkpoints.explain` and `merging.conflicts`: what to expect of a merge."""

import json
import math
from pathlib import Path

import pytest
import torch

from modbay import checkpoints, merging
from modbay.checkpoints import _expect, _explain
from modbay.errors import ConfigError, FileError, MergeError
from test_merge_command import call, floats, tensors, write


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with three models, a, b and origin, which is the present one."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("origin", "a", "b")):
        write(tmp_path / name, tensors(seed))
    return tmp_path


def drawn(n: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g, dtype=torch.float64) for _ in range(n)]


def flat_pairs(found: merging.Conflicts) -> list[float]:
    return [value for pair in found.pairs() for key, value in pair.items() if key != "of"]


# The figures, against plain formulas


def test_figures_of_four_numbers():
    """By hand: (1, −2, 0, 3) and (−1, −4, 5, 1), each with weight 1, from a base of norm 5."""
    a, b, base = (torch.tensor(x) for x in ([1.0, -2, 0, 3], [-1.0, -4, 5, 1], [3.0, 4, 0, 0]))
    found = merging.conflicts([a, b], base=base)
    (pair,) = found.pairs()
    first, second = found.models()
    whole = found.whole()
    assert pair["of"] == (0, 1)
    assert pair["both"] == pytest.approx(3 / 4)
    assert pair["differ"] == pytest.approx(1 / 3)
    assert pair["mass_differ"] == pytest.approx(2 / 12)
    assert pair["cosine"] == pytest.approx(10 / math.sqrt(14 * 43))
    assert pair["apart"] == pytest.approx(math.sqrt(4 + 4 + 25 + 4) / 5)
    assert first["norm"] == pytest.approx(math.sqrt(14)) and first["relative"] == pytest.approx(math.sqrt(14) / 5)
    assert first["changed"] == 3 / 4 and second["changed"] == 1
    merged = a + b  # (0, −6, 5, 4)
    assert first["along"] == pytest.approx(24 / 14) and second["along"] == pytest.approx(53 / 43)
    assert first["distance"] == pytest.approx(math.sqrt(43 / 14))
    assert first["against"] == 0 and first["still"] == pytest.approx(1 / 6)
    assert first["weight"] == second["weight"] == 1
    assert whole["differ"] == pytest.approx(1 / 4) and whole["mass_differ"] == pytest.approx(2 / 17)
    assert whole["cancelled"] == pytest.approx(1 - 15 / 17)
    assert whole["kept"] == pytest.approx(float(merged.norm() / (a.norm() + b.norm())))
    assert whole["unrelated"] == pytest.approx(math.sqrt(57) / (math.sqrt(14) + math.sqrt(43)))
    assert whole["base"] == 5 and whole["norm"] == pytest.approx(math.sqrt(77))


def test_weights_are_of_the_sum_alone():
    a, b = drawn(2, 50)
    plain, weighed = merging.conflicts([a, b]), merging.conflicts([a, b], [2.0, -0.5])
    assert plain.pairs() == weighed.pairs()
    assert [one["weight"] for one in weighed.models()] == pytest.approx([2.0, -0.5])
    merged = 2 * a - 0.5 * b
    assert weighed.models()[1]["along"] == pytest.approx(float(merged @ b / (b @ b)))
    assert weighed.whole()["cancelled"] == pytest.approx(
        float(1 - merged.abs().sum() / (2 * a.abs() + 0.5 * b.abs()).sum())
    )
    lost = b.abs()[merged.sign() != -b.sign()].sum() / b.abs().sum()  # its weight is negative: against is b's own sign
    assert weighed.models()[1]["against"] == pytest.approx(float(lost))


def test_pieces_and_tensors_add_up(monkeypatch):
    """Of three tensors, one by one and in pieces of a few numbers, the sums are those of all together."""
    vectors = drawn(3, 1000)
    base, merged = drawn(2, 1000, 1)
    whole = merging.conflicts(vectors, [1.0, 0.5, 2.0], merged, base)
    monkeypatch.setattr("modbay.merging._conflicts.PIECE", 60)
    parts = merging.Conflicts.none(3)
    for cut in (slice(0, 1), slice(1, 400), slice(400, 1000)):
        parts = parts + merging.conflicts([v[cut] for v in vectors], [1.0, 0.5, 2.0], merged[cut], base[cut])
    one, other = (flat_pairs(found) for found in (parts, whole))
    assert one == pytest.approx(other)
    assert parts.models() == [pytest.approx(one) for one in whole.models()]
    assert parts.whole() == pytest.approx(whole.whole())


def test_unrelated_vectors():
    """Normal numbers: half of the signs differ, by entries and by mass; with n, 1 − 2^(1−n); a sum is 1/√n as long."""
    found = merging.conflicts(drawn(4, 200_000))
    for pair in found.pairs():
        assert abs(pair["cosine"]) < 0.01 and abs(pair["differ"] - 0.5) < 0.01 and abs(pair["mass_differ"] - 0.5) < 0.01
    assert found.whole()["differ"] == pytest.approx(1 - 2**-3, abs=0.01)
    assert found.whole()["kept"] == pytest.approx(0.5, abs=0.01) and found.whole()["unrelated"] == pytest.approx(
        0.5, abs=0.01
    )
    assert found.whole()["cancelled"] == pytest.approx(0.5, abs=0.01)  # E|Σ|/ΣE|·| = 1/√n


def test_votes():
    """Kept parts (3, 0, −1) and (−2, 5, 0) elect + + −: the second loses 2 of its 8; 2 of the first's 6 was trimmed."""
    a, b = torch.tensor([3.0, 2, -1]), torch.tensor([-2.0, 5, 1])
    kept = [torch.tensor([3.0, 0, -1]), torch.tensor([-2.0, 5, 0])]
    first, second = merging.conflicts([a, b], parts=kept, voting=True).models()
    assert (first["trimmed"], first["outvoted"]) == (pytest.approx(2 / 6), 0)
    assert (second["trimmed"], second["outvoted"]) == (pytest.approx(1 / 8), pytest.approx(2 / 8))


def test_nothing_has_no_cosine():
    found = merging.conflicts([torch.zeros(3), torch.ones(3)])
    assert found.pairs()[0]["cosine"] is None and found.pairs()[0]["mass_differ"] is None
    assert found.models()[0]["along"] is None and merging.Conflicts.none(2).whole()["kept"] is None
    json.dumps([found.pairs(), found.models(), found.whole()], allow_nan=False)


def test_a_mask_of_infinities_is_no_change():
    mask = torch.tensor([float("-inf"), 0.0])
    tau = torch.tensor([0.0, 1.0])
    found = merging.conflicts([mask + tau - mask, tau], base=mask, merged=tau)
    assert found.models()[1]["along"] == 1 and found.whole()["base"] == 0


def test_weights_that_are_not_one_a_vector():
    with pytest.raises(MergeError, match=r"conflicts.*there are 1 of 2 models"):
        merging.conflicts(drawn(2, 3), [1.0])


# A recipe


def recipe(
    method: str = "task_arithmetic", models=("a", "b"), base: str | None = "origin", **parameters
) -> checkpoints.Recipe:
    return checkpoints.Recipe(method, list(models), base, parameters)


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in state.values()])


WAYS = {
    "task_arithmetic": {"lambda": 0.4, "weight": 0.8},
    "ties": {"density": 0.4, "lambda": 0.7},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}


@pytest.mark.parametrize("method", WAYS)
def test_the_merged_change_is_what_the_merge_writes(here, method):
    """Every figure of the merged change is of the checkpoint that the same recipe writes, draws of DARE included."""
    e = checkpoints.explain(recipe(method, **WAYS[method]))
    checkpoints.merge(recipe(method, **WAYS[method]), "ab")
    o, a, b, ab = (flat(floats(name)) for name in ("origin", "a", "b", "ab"))
    said = e.as_dict()
    for one, tau in zip(said["models"], (a - o, b - o), strict=True):
        assert one["along"] == pytest.approx(float((ab - o) @ tau / (tau @ tau)), rel=1e-5)
        assert one["distance"] == pytest.approx(float((ab - o - tau).norm() / tau.norm()), rel=1e-5)
        assert one["relative"] == pytest.approx(float(tau.norm() / o.norm()), rel=1e-6)
    assert said["all"]["norm"] == pytest.approx(float((ab - o).norm()), rel=1e-5)
    assert said["all"]["numbers"] == len(o) and said["tensors"] == len(floats("a"))
    assert said["pairs"][0]["cosine"] == pytest.approx(float(torch.cosine_similarity(a - o, b - o, 0)), rel=1e-5)
    assert not Path("ab.partial").exists()


def test_ties_tells_what_is_trimmed_and_out_voted(here):
    e = checkpoints.explain(recipe("ties", density=0.4))
    o, states = floats("origin"), [floats("a"), floats("b")]
    trimmed, outvoted, mass = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for name, start in o.items():
        taus = [state[name] - start for state in states]
        kept = [tau * merging.trim(tau, 0.4) for tau in taus]
        total = kept[0] + kept[1]
        for i in range(2):
            mass[i] += taus[i].abs().sum()
            trimmed[i] += taus[i].abs()[kept[i] == 0].sum()
            outvoted[i] += kept[i].abs()[kept[i].sign() == -total.sign()].sum()
    for one, out, lost in zip(e.as_dict()["models"], trimmed / mass, outvoted / mass, strict=True):
        assert one["trimmed"] == pytest.approx(float(out), rel=1e-5)
        assert one["outvoted"] == pytest.approx(float(lost), rel=1e-5)
    assert any("Trimming takes" in line and "out-voted" in line for line in e.words())


def test_layers_add_up_and_are_in_order(tmp_path):
    made = {f"model.layers.{i}.mlp.weight": torch.randn(4, 3) for i in range(11)} | {"embed.weight": torch.randn(5, 2)}
    made |= {"head": torch.randn(3)}
    for name in ("origin", "a"):
        write(tmp_path / name, {key: t + (name == "a") * torch.randn(t.shape) for key, t in made.items()})
    e = checkpoints.explain(checkpoints.Recipe("task_arithmetic", [str(tmp_path / "a")], str(tmp_path / "origin")))
    assert list(e.layers) == ["embed", "head", *(f"model.layers.{i}" for i in range(11))]
    total = sum((one.gram for one in e.layers.values()), torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(total, e.every.gram)
    assert e.as_dict()["layers"][2]["all"]["numbers"] == 12
    assert e.short == ["a"] and e.as_dict()["pairs"] == []


def test_weights_by_filter_and_what_is_kept(here):
    weight = [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]
    models = [checkpoints.Source("a", {"weight": weight}), "b"]
    e = checkpoints.explain(checkpoints.Recipe("task_arithmetic", models, "origin", keep=["embed.*"]))
    said = e.as_dict()
    assert said["kept"] == 2 and "embed" not in e.layers  # the integers, too
    a, o = floats("a"), floats("origin")
    square = {name: float((t - o[name]).square().sum()) for name, t in a.items() if name != "embed.weight"}
    weights = {name: 0.5 if "mlp" in name else 0.1 for name in square}
    mean = sum(weights[name] * square[name] for name in square) / sum(square.values())
    assert said["models"][0]["weight"] == pytest.approx(mean, rel=1e-5)


def test_without_a_base_changes_are_from_the_mean(here):
    e = checkpoints.explain(recipe("linear", base=None))
    a, b = (flat(floats(name)) for name in ("a", "b"))
    said = e.as_dict()
    assert said["base"] is None and said["from"] == "the mean of the models"
    assert said["pairs"][0]["models"] == pytest.approx(float(torch.cosine_similarity(a, b, 0)), abs=1e-6)
    assert said["pairs"][0]["apart"] == pytest.approx(float((a - b).norm() / ((a + b) / 2).norm()), rel=1e-5)
    assert said["all"]["kept"] is None and said["models"][0]["along"] is None
    first, second = e.words()
    assert first.startswith("No base was given") and "--base" in first
    assert "different starts" in second and "match_weights" in second


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_base_to_measure_from(here, method):
    """linear and SLERP have no base; one that is none of the models is what task vectors are differences from."""
    more = {"t": 0.3} if method == "slerp" else {}
    e = checkpoints.explain(recipe(method, **more))
    assert e.base == "origin" and e.models == ["a", "b"]
    assert e.as_dict() == checkpoints.explain(recipe(method, base=None, **more), base="origin").as_dict()
    checkpoints.merge(recipe(method, base=None, **more), "ab")
    o, a, ab = (flat(floats(name)) for name in ("origin", "a", "ab"))
    tau = a - o
    assert e.as_dict()["models"][0]["along"] == pytest.approx(float((ab - o) @ tau / (tau @ tau)), rel=1e-4)


def test_a_base_among_the_models(here):
    """What is averaged with its own fine-tunes is what they are measured from."""
    e = checkpoints.explain(recipe("linear", ("a", "b", "origin")))
    assert e.models == ["a", "b"] and [one["weight"] for one in e.as_dict()["models"]] == pytest.approx([1 / 3, 1 / 3])
    arc = checkpoints.explain(recipe("slerp", ("b",), "a", t=0.5))  # a is an end of the arc, not what it is from
    assert arc.base is None and arc.models == ["a", "b"]


def test_half_precision_tells_what_rounding_adds(tmp_path):
    base = {"layers.0.w": torch.randn(200, 50).bfloat16()}
    tuned = {"layers.0.w": base["layers.0.w"] + (2e-3 * torch.randn(200, 50)).bfloat16()}
    for name, made in (("origin", base), ("a", tuned)):
        write(tmp_path / name, made)
    r = checkpoints.Recipe("task_arithmetic", [str(tmp_path / "a")], str(tmp_path / "origin"), {"lambda": 0.3})
    e = checkpoints.explain(r)
    checkpoints.merge(r, tmp_path / "out")
    (entry,) = [checkpoints.open_checkpoint(str(tmp_path / "out")).tensor("layers.0.w").double()]
    o, tau = base["layers.0.w"].double(), tuned["layers.0.w"].double() - base["layers.0.w"].double()
    added = float((entry - o - 0.3 * tau).norm() / (0.3 * tau).norm())
    assert e.as_dict()["all"]["rounding"] == pytest.approx(added, rel=1e-4) and added > 0.1
    assert any("Rounding to bfloat16" in line and "--dtype float32" in line for line in e.words())


def test_progress_and_memory(here):
    """One call a tensor, up to 1; nothing is written."""
    seen: list[tuple[float, str]] = []
    before = sorted(here.rglob("*"))
    checkpoints.explain(recipe(), watch=lambda done, name: seen.append((done, name)))
    assert [name for _, name in seen] != [] and seen[-1][0] == 1 and len(seen) == len(tensors(0))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert sorted(here.rglob("*")) == before


def test_what_does_not_fit_is_refused(here):
    write(here / "other", {name: t for name, t in tensors(3).items() if name != "norm.scale"})
    with pytest.raises(FileError, match=r"other lacks 'norm\.scale'"):
        checkpoints.explain(recipe(models=("a", "other")))
    with pytest.raises(FileError, match=r"base='other': 'norm\.scale' can't be compared"):
        checkpoints.explain(recipe("linear", base=None), base="other")
    with pytest.raises(ConfigError, match="measures from the recipe's own"):
        checkpoints.explain(recipe(), base="b")
    with pytest.raises(ConfigError, match="base alone"):
        checkpoints.explain(recipe("linear", ("a",), "a"))
    with pytest.raises(ConfigError, match="no tensor would be merged"):
        checkpoints.explain(checkpoints.Recipe("task_arithmetic", ["a"], "origin", keep=["*"]))


# Words


def said_of(*vectors: torch.Tensor, method: str = "task_arithmetic", base=None, weights=None) -> str:
    base = torch.full_like(vectors[0], 30.0) if base is None else base
    found = merging.conflicts(vectors, weights, base=base)
    e = _explain.Explanation(
        method,
        [f"/x/{chr(97 + i)}" for i in range(len(vectors))],
        "/x/o",
        "float32",
        found,
        {"layers.0": found},
        1,
        0,
        [],
    )
    return "\n".join(e.words())


def test_words():
    a, b = drawn(2, 20_000)
    assert "a and b disagree in sign on 49 % of the mass that both change, as unrelated" in said_of(a, b)
    assert "right angles" in said_of(a, b) and "29 % of the mass cancels in the sum" in said_of(a, b)
    alike = said_of(a, a + 0.1 * b)
    assert "learnt much the same" in alike and "less than unrelated" in alike and "overshoots" in alike
    assert "pull apart" in said_of(a, 0.5 * b - a) and "more than unrelated" in said_of(a, 0.5 * b - a)
    assert "Little of a is left" in said_of(a, 0.5 * b - a)
    assert "share a part" in said_of(a, 0.3 * a + b)
    assert "b changes 5.0 times as much as a" in said_of(a, 5 * b)
    assert "is 100 % of the base's norm away" not in said_of(a, b) and "of the base's norm away" in said_of(
        a, b, base=a
    )
    assert "b is the base itself: it adds nothing." in said_of(a, 0 * b)
    left = a * (torch.arange(len(a)) % 2)
    assert "change no entry in common" in said_of(left, a - left)
    assert "a and b; a and c; b and c disagree" in said_of(*drawn(3, 20_000))
    assert "The merge changes nothing" in said_of(a, b, weights=[0.0, 0.0])


def test_numbers_in_words():
    shown = [_expect.per_cent(x) for x in (None, 0.0, 1e-9, 0.0004, 0.0149, 0.123, 1.5, -0.02)]
    assert shown == ["–", "0 %", "< 0.001 %", "0.04 %", "1.5 %", "12 %", "150 %", "−2.0 %"]
    assert _expect.two(-0.001) == "0.00" and _expect.two(-0.5) == "−0.50"


def test_names_are_short_where_they_can_be():
    none = merging.Conflicts.none(2)
    short = lambda *names: _explain.Explanation("ties", list(names), "o", "float32", none, {}, 0, 0, []).short
    assert short("/x/a/", "/y/b") == ["a", "b"] and short("x/m/last", "y/m/last") == ["x/m/last", "y/m/last"]


# The command


def test_tables(here):
    said = call("merge", "a", "b", "-b", "origin", "-m", "ties", "--density", "0.4", "--explain")
    wanted = ["ties: 9 tensors", "from the base, origin", "goes along", "trimmed", "out-voted", "signs differ, mass"]
    wanted += ["layers.2", "merged", "- a and b disagree in sign", "- Trimming takes"]
    assert [words for words in wanted if words not in said] == []
    assert not Path("ab").exists()
    linear = call("merge", "a", "b", "--explain", "--out", "ab")
    assert "the mean of the models" in linear and "cosine of the models" in linear and "goes along" not in linear
    assert not Path("ab").exists()


def test_eight_models_have_no_column_each(here):
    for seed in range(3, 9):
        write(here / f"m{seed}", tensors(seed))
    said = call(
        "merge", "a", "b", *(f"m{i}" for i in range(3, 9)), "-b", "origin", "-m", "task_arithmetic", "--explain"
    )
    assert "least" in said and "most" in said and "any two" in said and " more disagree in sign" in said


def test_json_is_the_python_call(here):
    said = json.loads(call("merge", "a", "b", "-b", "origin", "-m", "ties", "--density", "0.4", "--explain", "--json"))
    assert said == json.loads(json.dumps(checkpoints.explain(recipe("ties", density=0.4)).as_dict(), allow_nan=False))
    assert {"models", "pairs", "all", "layers", "words"} <= said.keys()


def test_a_recipe_s_file(here):
    Path("r.yaml").write_text("{merge_method: task_arithmetic, base_model: origin, models: [a, b], out: ab}")
    assert "task_arithmetic: 9 tensors" in call("merge", "r.yaml", "--explain") and not Path("ab").exists()


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize("base", [("-b", "origin", "-m", "ties"), ()])
def test_plot(here, suffix, base):
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        said = call("merge", "a", "b", *base, "--explain", "--plot", f"{name}.{suffix}")
        assert f"{name}.{suffix} shows it by layer" in said
    made = Path(f"one.{suffix}").read_bytes()
    assert made == Path(f"two.{suffix}").read_bytes()  # the same figures, the same file
    assert made.startswith(b"\x89PNG") if suffix == "png" else b"by layer" in made and b"</svg>" in made


def test_a_plot_that_can_t_be(here):
    assert "--explain" in call("merge", "a", "b", "--plot", "x.svg", "--dry-run", code=1)
    assert "ends in .svg" in call("merge", "a", "b", "--explain", "--plot", "x.txt", code=1)
    assert "no folder nowhere" in call("merge", "a", "b", "--explain", "--plot", "nowhere/x.svg", code=1)
