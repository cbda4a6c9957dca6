"""imatch.data.registry: names of weights and data sets, where they lie, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from imatch.core import config, settings
from imatch.core.step import run_folder
from imatch.core.types import ImatchError
from imatch.data import datasets, registry
from imatch.steps import last_finished

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / settings.DATA_KEY

TWELVE = """
vits16     | vit      | dinov3_vits16         | dinov3_vits16_pretrain_lvd1689m-08c60483.pth         | LVD
vits16+    | vit      | dinov3_vits16plus     | dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth     | LVD
vitb16     | vit      | dinov3_vitb16         | dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth         | LVD
vitl16     | vit      | dinov3_vitl16         | dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth         | LVD
vith16+    | vit      | dinov3_vith16plus     | dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth     | LVD
vit7b16    | vit      | dinov3_vit7b16        | dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth        | LVD
cxTiny     | convnext | dinov3_convnext_tiny  | dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb.pth  | LVD
cxSmall    | convnext | dinov3_convnext_small | dinov3_convnext_small_pretrain_lvd1689m-296db49d.pth | LVD
cxBase     | convnext | dinov3_convnext_base  | dinov3_convnext_base_pretrain_lvd1689m-801f2ba9.pth  | LVD
cxLarge    | convnext | dinov3_convnext_large | dinov3_convnext_large_pretrain_lvd1689m-61fa432d.pth | LVD
vitl16sat  | sat      | dinov3_vitl16         | dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth          | SAT
vit7b16sat | sat      | dinov3_vit7b16        | dinov3_vit7b16_pretrain_sat493m-a6675841.pth         | SAT
"""
GOLDEN = [[part.strip() for part in line.split("|")] for line in TWELVE.strip().splitlines()]
VITS = ["dinov3_vits16", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "LVD"]


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """An empty working folder, no variable set, no default of the container there."""
    for name, (_, local) in settings.ROOTS.items():
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(settings.ROOTS, name, (str(tmp_path / "no container"), local))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def key(content, name="key.json"):
    path = Path(name)
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content, sort_keys=False))
    return path


def weights(content):
    return registry.load(key({"weights": content}))


# --- roots ------------------------------------------------------------------------------------------------


LOCAL = {
    "DATASET_ROOT": "data",
    "REFERENCE_ROOT": "references",
    "WEIGHTS_ROOT": "weights",
    "DINOV3_REPO": "dinov3",
    "EXPORT_ROOT": "exports",
}
CONTAINER = {
    "DATASET_ROOT": "/opt/datasets",
    "REFERENCE_ROOT": "/opt/references",
    "WEIGHTS_ROOT": "/workspace/weights",
    "DINOV3_REPO": "/workspace/dinov3",
    "EXPORT_ROOT": "/exports",
}


def test_container_defaults():
    text = (ROOT / "imatch" / "core" / "settings.py").read_text()
    for name, folder in CONTAINER.items():
        assert f'"{name}": ("{folder}", "{LOCAL[name]}")' in text


@pytest.mark.parametrize("name", LOCAL)
def test_roots_from_variable_container_and_working_folder(monkeypatch, tmp_path, bare, name):
    assert settings.root(name) == bare / LOCAL[name]
    monkeypatch.setenv(name, "")
    assert settings.root(name) == bare / LOCAL[name]
    container = tmp_path / "container"
    monkeypatch.setitem(settings.ROOTS, name, (str(container), LOCAL[name]))
    assert settings.root(name) == bare / LOCAL[name]
    container.mkdir()
    assert settings.root(name) == container
    monkeypatch.setenv(name, str(tmp_path / "set"))
    assert settings.root(name) == tmp_path / "set"
    monkeypatch.setenv(name, "../relative")
    assert settings.root(name) == tmp_path / "relative"


def test_roots_are_the_same_from_the_notebooks(monkeypatch, bare):
    (bare / "notebooks").mkdir()
    monkeypatch.chdir(bare / "notebooks")
    assert settings.root("DATASET_ROOT") == bare / "data"


def test_exports_and_cache(monkeypatch, tmp_path, bare):
    assert settings.root("EXPORT_ROOT") == bare / "exports"
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path / "e"))
    assert settings.root("EXPORT_ROOT") == tmp_path / "e"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert settings.cache_folder() == tmp_path / "c" / "imatch"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.cache_folder() == tmp_path / ".cache" / "imatch"


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "group", "hub_entry", "filename", "family"), GOLDEN, ids=[row[0] for row in GOLDEN])
def test_the_twelve_weights(name, group, hub_entry, filename, family):
    for weight_set in ("", "dinov3"):
        weight = registry.load(SHIPPED).weight(name, weight_set)
        assert weight == registry.Weight(name, "dinov3", group, hub_entry, filename, family)


def test_there_are_twelve_and_no_more():
    assert [weight.key for weight in registry.load(SHIPPED).weights] == [row[0] for row in GOLDEN]


def test_unknown_weights_and_sets_get_the_nearest():
    shipped = registry.load(SHIPPED)
    for arguments, message in [
        (("vits61",), "unknown weight 'vits61': did you mean 'vits16'"),
        (("vits16 ",), "unknown weight 'vits16 ': did you mean 'vits16'"),
        (("vits16", "dinov2"), "unknown weight_set 'dinov2': did you mean 'dinov3'"),
        (("vits16", "dinov3.vit"), "unknown weight_set 'dinov3.vit': did you mean 'dinov3'"),
    ]:
        with pytest.raises(ImatchError, match=message):
            shipped.weight(*arguments)


def test_a_key_in_several_sets_must_say_which():
    other = [VITS[0], "mine.pth", "SAT"]
    read = weights({"a": {"vit": {"v": VITS}}, "b": {"vit": {"v": other}, "sat": {"v": VITS}}})
    with pytest.raises(
        ImatchError, match=r"weight v is in a\.vit, b\.vit, b\.sat: say which, such as SET/v, or rename one"
    ):
        read.weight("v")
    with pytest.raises(ImatchError, match=r"weight v is in b\.vit, b\.sat"):
        read.weight("v", "b")
    assert read.weight("v", "a").filename == VITS[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*VITS[:2], "sat "], "unknown family 'sat ': Known: LVD, SAT"),
        ([*VITS[:2], "Lvd"], "unknown family 'Lvd': Known: LVD, SAT"),
        ([*VITS[:2], ""], "unknown family ''.*Known: LVD, SAT"),
        ([*VITS[:2], "SAT"], "was trained as LVD, but its family is given as SAT"),
        ([VITS[0], "x_SAT493M-0.pth", "LVD"], "was trained as SAT, but its family is given as LVD"),
        (VITS[:2], r"wants \[hub entry, file name, LVD or SAT\]"),
        ([*VITS, "more"], r"wants \[hub entry"),
        ([VITS[0], 7, "LVD"], r"v\[1\] must be a valid string"),
        ("x.pth", "must be a valid list"),
        (["os.system", VITS[1], "LVD"], "is no name"),
        (["", VITS[1], "LVD"], "is no name"),
        *(
            ([VITS[0], name, "LVD"], "would leave WEIGHTS_ROOT")
            for name in ("../a.pth", "/a.pth", "b/a.pth", "..", ".", "", "..\\a.pth", "C:a.pth", "C:\\a.pth", "a\0.pth")
        ),
    ],
    ids=str,
)
def test_wrong_weights_are_refused(given, message):
    with pytest.raises(ImatchError, match=f"^key.json: weight.*{message}"):
        weights({"s": {"g": {"v": given}}})


NO_FOLDERS = ["../v", "..", ".", "/etc", "a/b", "a\\b", "", "a b", "a\nb", "a\0b", "a:b", "a.", ".a", "-a", "비" * 67]
NO_FOLDERS += ["CON", "nul.txt", "lpt1", "com¹"]


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_keys_that_cannot_name_a_folder_are_refused(name):
    with pytest.raises(ImatchError, match="becomes the name of a folder"):
        weights({"s": {"g": {name: VITS}}})
    with pytest.raises(ImatchError, match="becomes the name of a folder"):
        registry.load(key({"datasets": {name: {"root": "a"}}}))
    for chosen in (run_folder, lambda run: last_finished("", "01_embed", run)):
        with pytest.raises(ImatchError, match=r"^run '.*becomes the name of a folder"):
            chosen(name)
    assert run_folder("비" * 66).name == "비" * 66


def test_a_renamed_file_may_be_of_either_family():
    for family in ("LVD", "SAT"):
        assert weights({"s": {"g": {"v": [VITS[0], "mine.pth", family]}}}).weight("v").family == family


# --- data sets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "captures"])
def test_images_is_another_name_of_captures(name):
    read = registry.load(key({"datasets": {"d": {"root": "s", name: {"A1": "80m"}}}})).dataset("d")
    assert list(read.captures) == ["A1"]


def test_roots_are_below_dataset_root(monkeypatch, tmp_path, bare):
    content = {"datasets": {"d": {"root": "a/b"}, "all": {"root": ""}}}
    assert registry.load(key(content)).dataset("d").root == bare / "data" / "a" / "b"
    monkeypatch.setenv("DATASET_ROOT", str(tmp_path / "photographs"))
    assert registry.load(key(content)).dataset("d").root == tmp_path / "photographs" / "a" / "b"
    assert registry.load(key(content)).dataset("all").root == tmp_path / "photographs"


OUTSIDE = [
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "/x",
    "//host/x",
    "C:",
    "C:x",
    "C:\\x",
    "c:/x",
    "\\x",
    "..\\x",
    "a\\..\\..\\x",
]
OUTSIDE += ["\\\\host\\share\\x", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    "make",
    [
        lambda path: {"root": path},
        lambda path: {"root": "a", "glob": path},
        lambda path: {"root": "a", "captures": {"A1": {"label": "l", "folder": path}}},
        lambda path: {"root": "a", "captures": {"A1": "l"}, "folder_template": path},
        lambda path: {"root": "a", "captures": {"A1": "l"}, "filename_template": path + "/{frame}"},
        lambda path: {"root": "a", "captures": {"A1": {"label": "l", "folder_template": path}}},
        lambda path: {"root": "a", "captures": {"A1": path}, "folder_template": "{label}"},
        lambda path: {"root": "a", "captures": {path: "l"}, "folder_template": "{capture_id}"},
        lambda path: {
            "root": "a",
            "captures": {"A1": path},
            "filename_template": "{label}/{frame}",
            "folder_template": "f",
        },
    ],
    ids=[
        "root",
        "glob",
        "folder",
        "folder_template",
        "filename_template",
        "own template",
        "label",
        "id",
        "label in file",
    ],
)
def test_what_would_leave_its_root_is_refused(make, path):
    with pytest.raises(ImatchError, match="would leave"):
        registry.load(key({"datasets": {"d": make(path)}}))


@pytest.mark.parametrize("path", ["a.b", "..a", "a..", "a b", "a\\b", "~", "한글"])
def test_odd_names_that_stay_are_allowed(bare, path):
    assert registry.load(key({"datasets": {"d": {"root": path}}})).dataset("d").root == bare / "data" / path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "^key.json must be a valid dictionary"),
        ({"dataset": {}}, "key.json: dataset: unknown field 'dataset': did you mean 'datasets'"),
        ({"datasets": []}, "key.json: datasets must be a valid dictionary"),
        ({"weights": {"s": {"g": []}}}, r"key.json: weights\.s\.g must be a valid dictionary"),
        ({"datasets": {"d": "folder"}}, r"datasets\.d must be a valid dictionary"),
        ({"datasets": {"d": {}}}, r"datasets\.d\.root is missing"),
        ({"datasets": {"d": {"root": 3}}}, r"datasets\.d\.root must be a valid string, got 3"),
        ({"datasets": {"d": {"rot": "a"}}}, r"datasets\.d\.rot: unknown field 'rot': did you mean 'root'"),
        ({"datasets": {"d": {"root": "a", "glob": ["*"]}}}, r"datasets\.d\.glob must be a valid string"),
        ({"datasets": {"d": {"root": "a", "captures": {}}}}, r"datasets\.d\.captures: .* should have at least 1"),
        ({"datasets": {"d": {"root": "a", "captures": ["A"]}}}, r"datasets\.d\.captures must be a valid dictionary"),
        (
            {"datasets": {"d": {"root": "a", "captures": {"A": ["x"]}}}},
            r"captures\.A\.label must be a valid string",
        ),
        ({"datasets": {"d": {"root": "a", "captures": {"A": "l"}, "images": {"A": "l"}}}}, "keep one"),
        ({"datasets": {"d": {"root": "a", "captures": {"A": "l"}, "glob": "*"}}}, "both captures and a glob"),
        ({"datasets": {"d": {"root": "a", "folder_template": "x"}}}, "templates but no captures"),
        *(
            ({"datasets": {"d": {"root": "a", "captures": {"A": capture}}}}, message)
            for capture, message in [
                ({"lable": "x"}, r"d\.captures\.A\.lable: unknown field 'lable': did you mean 'label'"),
                ({"label": "x", "altitude": 3}, "altitude is another name of a field that is given, too: keep one"),
                ({"label": "x", "folder": "f", "folder_template": "g"}, "both a folder and a folder_template"),
                ({"label": False}, r"A\.label must be a valid string, got False"),
                ({"altitude": True}, r"A\.altitude must be a valid string, got True"),
                ({"folder": "f"}, r"wants {label}: give the capture a label"),
                ({"label": "x", "filename_template": ""}, r"A\.filename_template: .* should have at least 1"),
            ]
        ),
        *(
            ({"datasets": {"d": {"root": "a", "captures": {"A": "l"}, "filename_template": template}}}, message)
            for template, message in [
                ("{fram}.jpg", "unknown placeholder 'fram': did you mean 'frame'"),
                ("{}.jpg", "unknown placeholder ''"),
                ("{0}.jpg", "unknown placeholder '0'"),
                ("{label.__class__}{frame}", r"unknown placeholder 'label.__class__'"),
                ("{label[0]}{frame}", r"unknown placeholder 'label\[0\]'"),
                ("{frame!r}", "or with a padding such as {frame:04d}"),
                ("{frame:{label}}", "or with a padding such as {frame:04d}"),
                ("{frame:x}", "or with a padding such as {frame:04d}"),
                ("{frame:+d}", "or with a padding such as {frame:04d}"),
                ("{frame:*>4}", "or with a padding such as {frame:04d}"),
                ("{frame:0<4}", "or with a padding such as {frame:04d}"),
                ("{label!r}{frame}", "write {label}$"),
                ("{label:04d}{frame}", "does not fit text"),
                ("{frame", "is no template"),
                ("frame}", "is no template"),
            ]
        ),
        (
            {"datasets": {"d": {"root": "a", "captures": {"A": "l"}, "folder_template": "{frame}"}}},
            "folder_template.*unknown placeholder 'frame'",
        ),
    ],
    ids=str,
)
def test_wrong_registries_are_refused(content, message):
    with pytest.raises(ImatchError, match=message):
        registry.load(key(content))


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key.yaml", "key.yml", "KEY.YML"])
def test_yaml_equals_json(name):
    content = json.loads(SHIPPED.read_text())
    from_json, from_yaml = registry.load(SHIPPED), registry.load(key(content, name))
    assert from_yaml.datasets == from_json.datasets
    assert from_yaml.weights == from_json.weights


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("key.json", "{", "is no JSON"),
        ("key.json", "", "is no JSON"),
        ("key.yaml", "a: [", "is no YAML"),
        ("key.yaml", "", "must be a valid dictionary"),
        ("key.json", '{"weights": {"s": {}, "s": {}}}', "'s' is given 2 times"),
        ("key.yaml", "weights: {s: {}, s: {}}", "'s' is given 2 times"),
        ("key.yaml", "datasets: {d: {root: a, captures: {007: x}}}", r"captures\[7\] must be a valid string, got 7"),
        ("key.toml", "", "give a file that ends in .json, .yaml or .yml"),
        ("key.json", b"\xff\xfe", "is no JSON"),
        ("key.yaml", b"a: \xff", "is no YAML"),
    ],
    ids=str,
)
def test_files_that_cannot_be_read(name, text, message):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ImatchError, match=message):
        registry.load(name)
    with pytest.raises(ImatchError, match="no file"):
        registry.load("absent.json")


def test_a_byte_order_mark_is_nothing():
    Path("key.json").write_bytes(b"\xef\xbb\xbf{}")
    assert registry.load("key.json").weights == ()


# --- what a name means ------------------------------------------------------------------------------------


def test_a_name_is_a_key_else_a_folder(tmp_path, bare):
    path = str(key({"datasets": {"demo": {"root": "demo", "glob": "*"}, "lost": {"root": "lost"}}}))
    for folder in ("demo", "data/demo", "data/only here", "references/views"):
        (bare / folder).mkdir(parents=True)
    assert registry.dataset("demo", path) == datasets.Dataset("demo", bare / "data" / "demo", glob="*", registered=True)
    assert registry.dataset("data/demo", path) == datasets.Dataset("demo", bare / "data" / "demo")
    assert registry.dataset("demo", "absent.json").root == bare / "demo"
    assert registry.dataset("only here", path).root == bare / "data" / "only here"
    assert registry.dataset("views", path).root == bare / "references" / "views"
    assert registry.dataset(str(tmp_path), path).root == tmp_path
    assert registry.dataset("..", path).root == tmp_path
    with pytest.raises(ImatchError, match=r"data set lost of key.json: its folder .*data/lost does not exist"):
        registry.dataset("lost", path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no dataset given"),
        ("key.json", "is a file"),
        ("dmeo", "work/dmeo or .*data/dmeo or .*references/dmeo does not exist: .*did you mean 'demo'"),
        ("../dmeo", "does not exist: give an existing folder"),
    ],
)
def test_a_name_that_means_nothing(name, message):
    path = str(key({"datasets": {"demo": {"root": "demo"}}}))
    with pytest.raises(ImatchError, match=message):
        registry.dataset(name, path)
    if name == "dmeo":
        with pytest.raises(ImatchError, match=r"no keys in absent\.json"):
            registry.dataset(name, "absent.json")


def test_a_broken_registry_is_an_error_even_for_a_folder(bare):
    (bare / "photographs").mkdir()
    Path("key.json").write_text("{")
    with pytest.raises(ImatchError, match="is no JSON"):
        registry.dataset("photographs", "key.json")


def test_the_shipped_survey():
    made = registry.load(SHIPPED).dataset("survey")
    ids = ["flight01_80m/flight01_80m_0001.jpg", "second flight/DJI_0012.JPG"]
    assert made.select(ids) == {
        ids[0]: {"capture": "flight01", "label": "80m", "frame": 1},
        ids[1]: {"capture": "flight02", "label": "120", "frame": 12},
    }


# --- options of plug-ins ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needy:
    """A plug-in with an option that must be given."""

    entry: str
    size: int | None = None
    ratio: float = 1.0
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "thing needy: option entry is missing"),
        ({"size": 3}, "option entry is missing"),
        ({"entry": 3}, "thing needy: option entry must be a valid string, got 3"),
        ({"entry": "a", "size": "b"}, "thing needy: option size must be a valid integer, got 'b'"),
        ({"entry": "a", "ratio": True}, "thing needy: option ratio must be a valid number"),
        ({"entry": "a", "names": ["b"]}, "thing needy: option names must be a valid tuple"),
        ({"entyr": "a"}, "did you mean 'entry'"),
    ],
    ids=str,
)
def test_options_without_a_default_must_be_given(options, message):
    table = {"needy": f"{__name__}:Needy"}
    with pytest.raises(ImatchError, match=message):
        config.create(table, "thing", "needy", options)
    assert config.create(table, "thing", "needy", {"entry": "a", "size": None, "ratio": 2, "names": ("b",)}).ratio == 2
