"""A plan says all that is wrong with it, together, before any compute; what it says is kept whole."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from frostglass.auditing.cells import expand
from frostglass.auditing.plan import Plan, load_plan, parse_plan
from frostglass.core.errors import BadInput
from frostglass.core.threat import Knows

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "plans" / "reference.toml"
SMALL: dict[str, Any] = {"scenario": [{"attack": [{"name": "thaw"}]}]}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from models_in(inner)


def schema_keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted keys of the schema: tables with what is in them."""
    for name, field in model.model_fields.items():
        yield above + name
        for inner in models_in(field.annotation):
            yield from schema_keys(inner, f"{above}{name}.")


def named_keys(values: Any, above: str = "") -> Iterator[str]:
    for entry in values if isinstance(values, list) else [values]:
        if isinstance(entry, dict):
            for name, value in entry.items():
                yield above + name
                yield from named_keys(value, f"{above}{name}.")


def problems(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(BadInput) as wrong:
        parse_plan(values)
    return wrong.value.problems


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def scenario(**parts: Any) -> dict[str, Any]:
    return {"scenario": [{"attack": [{"name": "thaw"}], **parts}]}


def test_the_reference_plan_names_every_key_of_the_schema() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    uncommented = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.M)  # optional keys stand in their table as comments
    uncommented = uncommented.replace('\nfix = "opacus"                        # replaces', "\n#")
    named = set(named_keys(tomllib.loads(uncommented)))
    missing = [key for key in schema_keys(Plan) if key not in named]
    assert not missing, f"plans/reference.toml does not name {missing}"


def test_the_reference_plan_is_valid_and_every_key_is_explained() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    assert len(list(expand(load_plan(REFERENCE)))) == 2
    explained = set(re.findall(r"^(?:# )?(\w+) = .*?# \S", text, re.M))
    explained |= set(re.findall(r"^\[+(?:\w+\.)?(\w+)\]+ +# \S", text, re.M))
    keys = {key.rpartition(".")[2] for key in schema_keys(Plan)}
    assert keys - explained <= {"scenario", "report"}, "a key stands in plans/reference.toml without a comment"


def test_docs_explain_every_key() -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for key in schema_keys(Plan):
        table, _, name = key.rpartition(".")
        where = table.removeprefix("scenario.") if table not in ("", "scenario") else table
        assert f"`{name}`" in text, key
        assert not where or f"{where}]" in text or where == "defense.stack", where
    assert all(f"`{k.value}`" in text for k in Knows)


def test_docs_state_the_defaults_and_descriptions_of_the_schema() -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")

    def walk(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
        for name, field in model.model_fields.items():
            inner = list(models_in(field.annotation))
            if not inner:
                default = field.get_default(call_default_factory=True)
                yield name, toml(default) if not field.is_required() else "required"
            for m in inner:
                yield from walk(m)

    for name, default in walk(Plan):
        assert f"| `{name}` | {default} |" in text, f"docs/plan.md: `{name}` defaults to {default}"


def toml(value: Any) -> str:
    if value is None or value in ("", {}):
        return "-"
    words = {True: "true", False: "false"}
    if isinstance(value, bool):
        return f"`{words[value]}`"
    if isinstance(value, list):
        return "`[" + ", ".join(f'"{v}"' for v in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def test_all_schema_problems_come_together_each_with_its_place() -> None:
    found = problems(
        {
            "nmae": "x",
            "seed": -1,
            "scenario": [
                {
                    "attack": [{"name": "thaw"}],
                    "client": {"batch": 0, "bathces": 2, "lr": float("nan")},
                    "model": {"mode": "training"},
                }
            ],
            "report": {"show_images": "yes"},
        }
    )
    places = {p.split(":")[0] for p in found}
    assert places == {
        "nmae",
        "seed",
        "scenario.0.client.batch",
        "scenario.0.client.bathces",
        "scenario.0.client.lr",
        "scenario.0.model.mode",
        "report.show_images",
    }
    assert "did you mean 'name'" in next(p for p in found if p.startswith("nmae"))
    assert "did you mean 'batches'" in next(p for p in found if "bathces" in p)
    assert all(p.endswith(".") and "\n" not in p for p in found)


def test_schema_and_meaning_are_reported_together() -> None:
    found = problems(
        {
            "nmae": "x",
            "scenario": [{"attack": [{"name": "thwa"}], "defense": [{"name": "nnoe"}], "data": {"source": "photo"}}],
            "report": {"metrics": ["psnr", "sim"]},
        }
    )
    words = ["did you mean 'name'", "did you mean 'thaw'", "did you mean 'none'", "'photos'", "did you mean 'ssim'"]
    assert all(any(w in p for p in found) for w in words), found


def test_a_grant_is_not_called_lacking_where_the_grants_were_misspelled() -> None:
    found = problems(
        {"scenario": [{"attack": [{"name": "inverting_gradients"}]}], "threat": {"grnats": ["labels", "examples"]}}
    )
    assert len(found) == 1
    assert "did you mean 'grants'" in found[0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (scenario(attack=[{"name": "thwa"}]), "attack.0.name: 'thwa' is not a known attack; did you mean 'thaw'"),
        (scenario(defense=[{"name": "dpsgd"}]), "'dpsgd' is not a known defense; did you mean 'dp_sgd'"),
        (scenario(model={"name": "small_cnn"}), "'small_cnn' is not a known model; did you mean 'small_bn_cnn'"),
        (scenario(model={"options": {"widht": 3}}), "unknown parameter of 'small_bn_cnn'; did you mean 'width'"),
        (scenario(model={"options": {"classes": 3}}), "options.classes: set by the data"),
        (scenario(data={"source": "digit"}), "'digit' is not a known source; did you mean 'digits'"),
        (scenario(data={"source": "folder"}), "'folder' lacks a path; write 'folder:PATH'"),
        (scenario(data={"source": "photos:x"}), "'photos' takes no path"),
        (scenario(attack=[{"name": "thaw", "step": 3}]), "unknown parameter of 'thaw'; did you mean 'steps'"),
        (scenario(attack=[{"name": "thaw", "steps": "3"}]), "'3' is not a whole number"),
        (scenario(attack=[{"name": "thaw", "lr": float("inf")}]), "inf is not a number"),
        (scenario(defense=[{"name": "dp_sgd", "clipping_norm": -1.0}]), "clipping_norm"),
        (scenario(attack=[]), "scenario.0.attack: empty; give at least one"),
        (scenario(defense=[]), "scenario.0.defense: empty; give at least one"),
        (scenario(defense=[{}]), "give a name, or stack"),
        (scenario(defense=[{"name": "none", "stack": [{"name": "none"}]}]), "both a stack and a name"),
        (scenario(defense=[{"stack": [{"name": "dp_sgd"}, {"name": "dp_sgd"}]}]), "both replace the client step"),
        (scenario(client={"local_steps": 2}), 'need update = "delta"'),
        (scenario(client={"clients": 3, "cohort": 2}), "2 does not divide clients = 3"),
        (scenario(client={"batch": "8"}), "'8' is not valid"),
        (scenario(client={"batch": True}), "True is not valid"),
        (scenario(name="two\nlines"), "use one line"),
        (scenario(threat={"grants": ["lables"]}), "0.threat.grants: 'lables' is not a grant; did you mean 'labels'"),
        (SMALL | {"threat": {"grants": ["auxiliary", "examples"]}}, "set threat.auxiliary to a data source"),
        (SMALL | {"threat": {"auxiliary": "photo"}}, "threat.auxiliary: 'photo' is not a known source"),
        (SMALL | {"report": {"metrics": ["pnsr", "ssim"]}}, "'pnsr' is not a metric; did you mean 'psnr'"),
        (SMALL | {"report": {"threshold": {"metric": "fft2d"}}}, "'fft2d' is not among report.metrics"),
        (SMALL | {"report": {"threshold": {"metric": "sim"}}}, "did you mean 'ssim'"),
        (SMALL | {"seed": 2**70}, "seed"),
        ({}, "scenario: missing"),
        ({"scenario": {"attack": [{"name": "thaw"}]}}, "write [[scenario]]"),
        ({"scenario": 3}, "scenario: 3 is not valid"),
        ({"scenario": [3]}, "scenario.0: 3 is not valid: a table is wanted, as { key = value }."),
        (SMALL | {"name": "x" * 201}, "name"),
        ({"scenario": SMALL["scenario"] * 2 + [{"name": "scenario 1", **SMALL["scenario"][0]}]}, "taken by another"),
        (scenario(attack=[{"name": "thaw", "tv": object()}]), "is not a number"),
        (scenario(model={"name": "a.b:c", "options": {"x": object()}}), "TOML does not have"),
    ],
)  # fmt: skip
def test_each_mistake_is_a_sentence_with_the_way_out(values: dict[str, Any], sentence: str) -> None:
    found = problems(values)
    assert any(sentence in p for p in found), found
    assert all(len(p) < 400 and "\n" not in p for p in found)


def test_an_attack_that_needs_a_grant_is_refused_without_it() -> None:
    needy = {"scenario": [{"attack": [{"name": "inverting_gradients"}]}]}
    (found,) = problems(needy | {"threat": {"grants": ["examples"]}})
    assert "'inverting_gradients' needs the grant 'labels'; add to threat.grants" in found
    parse_plan(needy | {"threat": {"grants": ["examples", "labels"]}})


def test_a_scenarios_threat_replaces_the_plans() -> None:
    own = {"name": "own", "grants": ["examples", "labels"]}
    attack = [{"name": "inverting_gradients"}]
    plan = parse_plan(
        {"scenario": [{"attack": attack, "threat": own}, *SMALL["scenario"]], "threat": {"grants": ["examples"]}}
    )
    cells = list(expand(plan))
    assert [c.threat.name for c in cells] == ["own", "honest-but-curious server"]
    assert [c.threat.grants for c in cells] == [["examples", "labels"], ["examples"]]


def test_scenarios_without_names_are_numbered() -> None:
    plan = parse_plan({"scenario": [*SMALL["scenario"], {"name": "x", **SMALL["scenario"][0]}, *SMALL["scenario"]]})
    assert [s.name for s in plan.scenario] == ["scenario 1", "x", "scenario 3"]


def test_cells_have_ids_of_their_own_and_titles_that_tell_them_apart() -> None:
    attack = [{"name": "thaw"}, {"name": "thaw", "steps": 5}]
    defense = [{"name": "dp_sgd", "noise_multiplier": s} for s in (0.1, 1.0)]
    plan = parse_plan(
        {"scenario": [{"name": n, "attack": attack, "defense": defense} for n in ("Ünï/cødé", "日本", "x" * 90)]}
    )
    cells = list(expand(plan))
    assert len({c.id for c in cells}) == len(cells) == 12
    assert len({c.title for c in cells}) == 12
    assert all(re.fullmatch(r"[a-z0-9-]+", c.id) for c in cells)
    assert "noise_multiplier = 0.1" in cells[0].title
    assert "steps = 5" in cells[1].title


def test_more_than_the_client_sends_is_an_upper_bound() -> None:
    def title(**parts: Any) -> str:
        grants = {"grants": ["examples", "bn_batch"]}
        return next(iter(expand(parse_plan(scenario(**parts) | {"threat": grants})))).title

    assert "upper bound" not in title()
    assert title(model={"mode": "eval"}).endswith("(upper bound)")
    assert title(client={"clients": 2, "cohort": 2}).endswith("(upper bound)")


TEXT = """
seed = 3
[[scenario]]
[scenario.data]
source = "folder:pictures"
[scenario.model]
weights = "sub/w.safetensors"
[scenario.client]
batch = 2
[[scenario.defense]]
name = "none"
[[scenario.attack]]
name = "thaw"
[[scenario]]
[[scenario.attack]]
name = "thaw"
steps = 5
[scenario.threat]
grants = ["examples", "auxiliary"]
auxiliary = "folder:/absolute"
"""


def test_relative_paths_start_at_the_plans_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path, TEXT)
    plan = load_plan(Path("..") / "plan.toml")
    assert plan.scenario[0].data.source == f"folder:{tmp_path}/pictures"
    assert plan.scenario[0].model.weights == f"{tmp_path}/sub/w.safetensors"
    assert plan.scenario[1].threat is not None
    assert plan.scenario[1].threat.auxiliary == "folder:/absolute"
    assert plan.scenario[1].data.source == "photos"


def test_a_home_is_a_home_and_an_empty_path_stays_empty(tmp_path: Path) -> None:
    home = TEXT.replace("folder:pictures", "folder:~/pictures")
    assert load_plan(write(tmp_path, home)).scenario[0].data.source == f"folder:{Path.home()}/pictures"
    with pytest.raises(BadInput, match="lacks a path"):
        load_plan(write(tmp_path, TEXT.replace("folder:pictures", "folder:")))


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("seed=9", lambda p: p.seed, 9),
        ("name=two words", lambda p: p.name, "two words"),
        ('name="quoted"', lambda p: p.name, "quoted"),
        ("scenario.client.batch=8", lambda p: [s.client.batch for s in p.scenario], [8, 8]),
        ("scenario.1.client.batch=8", lambda p: [s.client.batch for s in p.scenario], [2, 8]),
        ("scenario.attack.steps=7", lambda p: [s.attack[0].settings for s in p.scenario], [{"steps": 7}] * 2),
        ("scenario.0.attack.0.steps=7", lambda p: p.scenario[0].attack[0].settings, {"steps": 7}),
        ("scenario.0.attack.0={name='spear'}", lambda p: p.scenario[0].attack[0].name, "spear"),
        ('threat.grants=["examples","labels"]', lambda p: p.threat.grants, ["examples", "labels"]),
        ("scenario.1.threat.grants.1=labels", lambda p: p.scenario[1].threat.grants, ["examples", "labels"]),
        ("scenario.model.options.width=4", lambda p: p.scenario[0].model.options, {"width": 4}),
        ("report.show_images=true", lambda p: p.report.show_images, True),
        ("report.threshold.value=0.7", lambda p: p.report.threshold.value, 0.7),
        ("scenario.data={source='digits'}", lambda p: [s.data.source for s in p.scenario], ["digits"] * 2),
    ],
)  # fmt: skip
def test_overrides_reach_their_key(tmp_path: Path, override: str, get: Any, value: Any) -> None:
    assert get(load_plan(write(tmp_path, TEXT), [override])) == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "must read key=value"),
        ("=3", "must read key=value"),
        ("scenario.7.client.batch=8", "names entry 7 of 2; count from 0"),
        ("scenario.0=3", "scenario.0: 3 is not valid"),
        ("seed.x=3", "goes into a value that is no table"),
        ("threat.grants.x=3", "threat"),
        ("sede=3", "did you mean 'seed'"),
        ("scenario.client.batch=many", "'many' is not valid"),
        ("a..b=3", "unknown key"),
        ("scenario.²=3", "unknown key"),
        ("seed=" + "9" * 5000, "seed"),
        ("seed=" + "[" * 5000, "seed"),
        ("name=a\nb", "one line"),
    ],
)
def test_overrides_that_go_nowhere_are_refused(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)):
        load_plan(write(tmp_path, TEXT), [override])


@pytest.mark.parametrize(
    "content", [b"seed = ", b"\xff\xfe", b"a = 1\na = 2", b"seed = " + b"9" * 5000, b"a = " + b"[" * 9000, b"\x00"]
)
def test_files_that_are_no_toml_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"plan: .*plan\.toml"):
        load_plan(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist; `frostglass init` writes one"):
        load_plan(tmp_path / "none.toml")
    with pytest.raises(BadInput, match=r"cannot be read \(Is a directory\); give a TOML file that you may read\.$"):
        load_plan(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_plan_in_another_encoding_is_refused_with_what_to_do(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('name = "\u00fcber"', encoding=encoding)
    with pytest.raises(BadInput, match=r"plan\.toml cannot be read as UTF-8 \(.*\); save it in UTF-8\.$"):
        load_plan(path)


def test_an_editors_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load_plan(path).seed == 3


def test_the_resolved_plan_reads_back_as_itself(tmp_path: Path) -> None:
    for plan in (load_plan(write(tmp_path, TEXT)), load_plan(REFERENCE), parse_plan(SMALL)):
        again = load_plan(write(tmp_path, plan.to_toml()))
        assert again == plan
        assert again.digest() == plan.digest()


def test_what_is_none_stays_out_of_the_resolved_plan() -> None:
    plan = parse_plan(scenario(attack=[{"name": "spear", "samples": None}], model={"name": "mlp"}))
    assert "None" not in plan.to_toml()
    assert "samples" not in plan.to_toml()


def test_every_change_of_a_plan_changes_its_digest() -> None:
    plans = [SMALL, SMALL | {"seed": 1}, scenario(client={"batch": 3}), scenario(attack=[{"name": "thaw", "steps": 3}])]
    assert len({parse_plan(p).digest() for p in plans}) == len(plans)
