"""imatch.cli.manifest: what the three manifests expand to, and what is refused."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml

from imatch.cli import batch, manifest
from imatch.core import settings
from imatch.core.types import ImatchError
from tests.command import command

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / settings.DATA_KEY
NOTEBOOKS = ROOT / "notebooks"
SMALL = {"dataset_key": "survey", "models": [{"weights": "vits16", "target_res": 256}]}


def write(tmp_path, content, name="manifest.json"):
    path = tmp_path / name
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content, sort_keys=False))
    return path


def read(tmp_path, content, name="manifest.json"):
    return manifest.read(write(tmp_path, content, name), SHIPPED)


def points(*arguments):
    return list(read(*arguments)[1].values())


def model(**fields):
    return {**SMALL, "models": [{**SMALL["models"][0], **fields}]}


def shared(tag):
    return {
        "dataset": "survey",
        "data_key": str(SHIPPED),
        "resize.mode": "stretch",
        "tag": tag,
        "run": "manifest",
        **({"crops": [1.0]} if tag == "reference" else {}),
    }


# --- expansion --------------------------------------------------------------------------------------------


def test_the_shipped_manifest():
    found = manifest.read(ROOT / "params" / "manifest.json", SHIPPED)
    rest = {
        "image_groups": [{"folder": "flight01", "indices": {"from": 1, "to": 132}}, {"folder": "flight02"}],
        "files": ["global.npy", "global.json", "patch.npy", "grid.npy", "denseft.png", "denseft.npy"],
    }
    assert manifest.ROLES["dataset"] == ["01_embed"]
    assert found == (
        shared(""),
        {
            f"weight={weight} cfg=res256 variant={variant}": {
                "weight": f"dinov3/{weight}",
                "resize.long_side": 256,
                "storage.variant": variant,
                **rest,
            }
            for weight in ("vits16", "cxTiny")
            for variant in ("raw", "sub2")
        },
    )


def test_the_shipped_query_manifest():
    found = manifest.read(ROOT / "params" / "manifestQuery.json", SHIPPED)
    assert manifest.ROLES["query"] == ["01_embed"]
    assert found == (
        shared("query"),
        {
            "weight=vits16 cfg=res256 variant=raw": {
                "weight": "dinov3/vits16",
                "resize.long_side": 256,
                "storage.variant": "raw",
                "image_groups": [{"folder": ["flight01", "flight02"], "indices": [[1, 3], [1, 2, 5]]}],
                "files": ["global.npy", "patch.npy", "grid.npy"],
            }
        },
    )


def test_the_shipped_reference_manifest():
    found = manifest.read(ROOT / "params" / "manifestReference.json", SHIPPED)
    assert manifest.ROLES["reference"] == ["01_embed", "02_references"]
    assert found == (
        shared("reference"),
        {
            "weight=vits16 cfg=res256 variant=raw": {
                "weight": "dinov3/vits16",
                "resize.long_side": 256,
                "storage.variant": "raw",
                "image_groups": [{"folder": "flight01", "indices": [1, 3]}],
                "files": ["global.npy", "patch.npy"],
                "angles": [0, 90, 180, 270],
            }
        },
    )


def test_the_least_a_manifest_says(tmp_path):
    parameters, found = read(tmp_path, SMALL)
    assert parameters == shared("")
    point = {"weight": "vits16", "resize.long_side": 256, "storage.variant": "raw", "image_groups": [], "files": []}
    assert found == {"weight=vits16 cfg=res256 variant=raw": point}


def test_every_weight_size_and_variant(tmp_path):
    content = {
        **SMALL,
        "weight_set": "dinov3",
        "experiment": {"variant": {"raw": True, "sub": {"use": True, "stride": [2, 4]}}},
        "models": [
            {"weights": ["vits16", "vits16+"], "target_res": [256, 512]},
            {"weight_key": " vitb16, vitl16 ", "target_res": 224, "embedding_cfg": "small"},
        ],
    }
    _, found = read(tmp_path, content)
    assert [(label, point["resize.long_side"], point.get("storage.cfg", "")) for label, point in found.items()] == [
        (f"weight={weight} cfg={cfg} variant={variant}", size, cfg.removeprefix(f"res{size}"))
        for weight, size, cfg in [
            *(("vits16", 256, "res256"), ("vits16", 512, "res512")),
            *(("vits16+", 256, "res256"), ("vits16+", 512, "res512")),
            *(("vitb16", 224, "small"), ("vitl16", 224, "small")),
        ]
        for variant in ("raw", "sub2", "sub4")
    ]


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ({}, ["raw"]),
        ({"raw": True}, ["raw"]),
        ({"sub": {"use": True, "stride": 2}}, ["raw", "sub2"]),
        ({"raw": False, "sub": {"use": True, "stride": [4, 2, 4]}}, ["sub4", "sub2"]),
        ({"sub": {"use": False, "stride": [2]}}, ["raw"]),
        ({"sub": {"use": False}}, ["raw"]),
        ({"sub": {"use": False, "stride": [1, 2]}}, ["raw"]),
    ],
    ids=str,
)
def test_variants(tmp_path, variant, wanted):
    found = points(tmp_path, {**SMALL, "experiment": {"variant": variant}})
    assert [point["storage.variant"] for point in found] == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, []),
        ({"outputs": {"global": {"npy": True, "json": False}}}, ["global.npy"]),
        (
            {"outputs": {"grid": {"json": True}, "patch": {"json": True, "npy": True}}},
            ["patch.npy", "patch.json", "grid.json"],
        ),
        ({"run": {"generate_denseft": True}}, ["denseft.png", "denseft.npy"]),
        (
            {"outputs": {"global": {"npy": True}}, "run": {"test_embedding": False, "generate_denseft": True}},
            ["global.npy", "denseft.png", "denseft.npy"],
        ),
    ],
    ids=str,
)
def test_outputs(tmp_path, fields, wanted):
    assert points(tmp_path, model(**fields))[0]["files"] == wanted


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("manifest.json", "dataset"),
        ("manifestQuery.json", "query"),
        ("MANIFEST_QUERY.json", "query"),
        ("manifestReference.json", "reference"),
        ("references.json", "reference"),
        ("anything.json", "dataset"),
    ],
)
def test_the_name_of_the_file_says_the_role(tmp_path, name, role):
    parameters, _ = read(tmp_path, SMALL, name)
    assert manifest.role(name) == role
    assert list(batch.load(write(tmp_path, SMALL, name), [("data_key", str(SHIPPED))], NOTEBOOKS).notebooks) == (
        ["01_embed", "02_references"] if role == "reference" else ["01_embed"]
    )
    assert parameters["tag"] == {"dataset": ""}.get(role, role)


def test_a_name_that_says_two_things(tmp_path):
    with pytest.raises(ImatchError, match="says both query and reference"):
        read(tmp_path, SMALL, "queryReference.json")


@pytest.mark.parametrize("name", ["manifest", "manifestQuery", "manifestReference"])
def test_yaml_of_the_same_shape_is_the_same(tmp_path, name):
    content = json.loads((ROOT / "params" / f"{name}.json").read_text())
    assert read(tmp_path, content, f"{name}.yaml") == read(tmp_path, content, f"{name}.json")


def test_models_that_are_switched_off_are_said(tmp_path, capsys):
    off = {"weights": "vitb16", "target_res": 256, "run": {"test_embedding": False, "generate_denseft": False}}
    content = {**SMALL, "models": [*SMALL["models"], off]}
    assert [point["weight"] for point in points(tmp_path, content)] == ["vits16"]
    assert "manifest.json: models[1] is skipped: its run switches off" in capsys.readouterr().out
    with pytest.raises(ImatchError, match="there is nothing to run"):
        read(tmp_path, {**SMALL, "models": [off]})
    with pytest.raises(ImatchError, match="did you mean 'vitb16'"):
        read(tmp_path, {**SMALL, "models": [*SMALL["models"], {**off, "weights": "vitb61"}]})


def test_models_that_differ_in_photographs_alone_are_one_point(tmp_path):
    one, two = {"folder": "flight01", "indices": [1, 3]}, {"folder": "flight02"}
    models = [{**SMALL["models"][0], "image_groups": groups} for groups in ([one], [one, two])]
    assert [point["image_groups"] for point in points(tmp_path, {**SMALL, "models": models})] == [[one, two]]
    models.append(SMALL["models"][0])
    assert [point["image_groups"] for point in points(tmp_path, {**SMALL, "models": models})] == [[]]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"target_res": 512, "embedding_cfg": "res256"},
            r"models\[1\] asks for weight=vits16 cfg=res256 variant=raw again, but with another resize.long_side",
        ),
        ({"outputs": {"global": {"npy": True}}}, r"another files \(\['global.npy'\], not \[\]\)"),
        ({"run": {"generate_denseft": True}}, "another files"),
    ],
    ids=str,
)
def test_models_that_would_write_over_each_other_are_refused(tmp_path, other, message):
    with pytest.raises(ImatchError, match=message):
        read(tmp_path, {**SMALL, "models": [SMALL["models"][0], {**SMALL["models"][0], **other}]})


def test_what_only_the_second_model_says_is_not_lost(tmp_path):
    one, two = {"folder": "flight01"}, {"folder": "flight02", "rotation": 90}
    models = [{**SMALL["models"][0], "image_groups": [group]} for group in (one, two)]
    with pytest.raises(ImatchError, match=r"another angles \(\[90\], not None\)"):
        read(tmp_path, {**SMALL, "models": models}, "manifestReference.json")


# --- rotation ---------------------------------------------------------------------------------------------


def turned(*rotations):
    return model(image_groups=[{"folder": "flight01", "rotation": rotation} for rotation in rotations])


@pytest.mark.parametrize(
    ("rotations", "wanted"),
    [((90,), [90]), (([0, 45.5],), [0, 45.5]), (([0, 90], [0, 90]), [0, 90]), ((90, [90]), [90]), ((0,), [0])],
    ids=str,
)
def test_rotation_of_references_is_their_angles(tmp_path, rotations, wanted):
    point = points(tmp_path, turned(*rotations), "manifestReference.json")[0]
    assert point["angles"] == wanted
    assert point["image_groups"] == [{"folder": "flight01"}] * len(rotations)


@pytest.mark.parametrize("content", [SMALL, turned(), turned(None), turned(None, None)], ids=str)
def test_without_rotation_the_notebook_says_the_angles(tmp_path, content):
    assert "angles" not in points(tmp_path, content, "manifestReference.json")[0]


@pytest.mark.parametrize(
    ("rotations", "message"),
    [
        ((90, 180), "have different rotations"),
        ((90, None), "have different rotations"),
        (([],), r"image_groups\[0\].rotation names no angle"),
        (("90",), r"image_groups\[0\].rotation\[0\] must be a valid number"),
        ((True,), r"rotation\[0\] must be a valid number, got True"),
        (([90, "x"],), r"rotation\[1\] must be a valid number"),
        ((float("inf"),), "must be a finite number"),
    ],
    ids=str,
)
def test_wrong_rotations_are_refused(tmp_path, rotations, message):
    with pytest.raises(ImatchError, match=message):
        read(tmp_path, turned(*rotations), "manifestReference.json")


@pytest.mark.parametrize("name", ["manifest.json", "manifestQuery.json"])
def test_photographs_are_embedded_as_they_are(tmp_path, name):
    for rotation in (None, 0, [0], [], 0.0):
        [point] = points(tmp_path, turned(rotation), name)
        assert point["image_groups"] == [{"folder": "flight01"}]
        assert "angles" not in point
    for rotation in (90, [0, 90], [90]):
        with pytest.raises(ImatchError, match="ask for turned views in the reference manifest"):
            read(tmp_path, turned(rotation), name)


def test_other_views_have_a_folder_of_their_own(tmp_path):
    groups = [{"folder": "flight01", "rotation": 90}], [{"folder": "flight02", "rotation": 90}]
    models = [
        {"weights": weights, "target_res": 256, "image_groups": group}
        for weights, group in [("vits16, vitb16", groups[0]), ("vitl16", groups[1]), ("cxTiny", groups[0])]
    ]
    parameters, found = read(tmp_path, {**SMALL, "models": models}, "manifestReference.json")
    tags = [{**parameters, **point}["tag"] for point in found.values()]
    assert tags == ["reference", "reference", "reference2", "reference"]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": []}, r"manifest\.json: modles: unknown field 'modles': did you mean 'models'"),
        ({"dataset_kye": "x"}, "dataset_kye: unknown field 'dataset_kye': did you mean 'dataset_key'"),
        ({"dataset_key": "survye"}, "unknown data set 'survye': did you mean 'survey'"),
        ({"dataset_key": 3}, r"manifest\.json: dataset_key must be a valid string, got 3"),
        ({"dataset_key": None}, "dataset_key is missing"),
        ({"models": None}, "models is missing"),
        ({"models": {}}, r"manifest\.json: models must be a valid list"),
        ({"models": []}, "there is nothing to run"),
        ({"models": ["vits16"]}, r"models\[0\] must be a valid dictionary"),
        ({"weight_set": ["dinov3"]}, "weight_set must be a valid string"),
        ({"weight_set": "dinov33"}, "unknown weight_set 'dinov33': did you mean 'dinov3'"),
        ({"weight_set": "dinov3.vit"}, "unknown weight_set 'dinov3.vit': did you mean 'dinov3'"),
        ({"experiment": []}, "experiment must be a valid dictionary"),
        ({"experiment": {"varient": {}}}, r"experiment\.varient: unknown field.*did you mean 'variant'"),
        ({"experiment": {"variant": {"rwa": True}}}, r"experiment\.variant\.rwa: .*did you mean 'raw'"),
        ({"experiment": {"variant": {"raw": 1}}}, r"experiment\.variant\.raw must be a valid boolean, got 1"),
        ({"experiment": {"variant": {"raw": False}}}, "switches off raw and sub"),
        ({"experiment": {"variant": {"sub": True}}}, r"variant\.sub must be a valid dictionary"),
        ({"experiment": {"variant": {"sub": {"stride": [2]}}}}, r"variant\.sub\.use is missing"),
        ({"experiment": {"variant": {"sub": {"use": "yes"}}}}, r"variant\.sub\.use must be a valid boolean"),
        (
            {"experiment": {"variant": {"sub": {"use": True}}}},
            r"variant\.sub\.stride wants every how many rows .* got \[\]",
        ),
        ({"experiment": {"variant": {"sub": {"use": True, "strid": 2}}}}, "did you mean 'stride'"),
        (
            {"experiment": {"variant": {"sub": {"use": True, "stride": "2"}}}},
            r"stride\[0\] must be a valid integer, got '2'",
        ),
        (
            {"experiment": {"variant": {"sub": {"use": True, "stride": [2, 1]}}}},
            r"stride wants .* 2 or more, .*\[2, 1\]",
        ),
    ],
    ids=str,
)
def test_wrong_manifests_are_refused(tmp_path, change, message):
    with pytest.raises(ImatchError, match=message):
        read(tmp_path, {**SMALL, **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_rse": 256}, r"manifest\.json: models\[0\]\.target_rse: unknown field.*did you mean 'target_res'"),
        ({"weights": "vits61"}, r"models\[0\]: .*unknown weight 'vits61': did you mean 'vits16'"),
        ({"weights": ["vits16", "sift"]}, "unknown weight 'sift'"),
        ({"weights": "vits16,"}, r"models\[0\]\.weights\[1\]: .* should have at least 1"),
        ({"weights": []}, r"models\[0\]\.weights: .* should have at least 1"),
        ({"weights": 16}, r"models\[0\]\.weights must be a valid list, got 16"),
        ({"weights": [16]}, r"models\[0\]\.weights\[0\] must be a valid string, got 16"),
        ({"weights": None}, r"models\[0\]\.weights is missing"),
        ({"weight_key": "vits16"}, r"models\[0\]\.weight_key is another name of a field.*keep one"),
        ({"target_res": None}, r"models\[0\]\.target_res is missing"),
        ({"target_res": "256"}, r"models\[0\]\.target_res\[0\] must be a valid integer, got '256'"),
        ({"target_res": 256.0}, r"target_res\[0\] must be a valid integer"),
        ({"target_res": [256, 0]}, r"target_res\[1\] must be greater than 0, got 0"),
        ({"target_res": []}, "target_res: .* should have at least 1"),
        ({"target_res": [256, 250]}, r"models\[0\]: long_side 250 is not a multiple of patch 16: use 240 or 256"),
        ({"weights": "cxTiny", "target_res": 240}, r"models\[0\]: long_side 240 .* patch 32: use 224 or 256"),
        ({"embedding_cfg": 256}, r"embedding_cfg must be a valid string"),
        ({"embedding_cfg": "../x"}, "embedding_cfg '../x': it becomes the name of a folder"),
        ({"embedding_cfg": "x", "target_res": [256, 512]}, "embedding_cfg 'x' names one size"),
        ({"image_groups": {}}, r"models\[0\]\.image_groups must be a valid list"),
        (
            {"image_groups": [{}, {"indicse": [1]}]},
            r"models\[0\]: image_groups\[1\]\.indicse: .*did you mean 'indices'",
        ),
        ({"image_groups": [{"indices": [5, 2]}]}, r"image_groups\[0\]\.indices: the range ends at 2"),
        ({"image_groups": [{"folder": "flight1"}]}, r"models\[0\]: .*'flight1': did you mean 'flight01'"),
        ({"outputs": ["global"]}, r"models\[0\]\.outputs must be a valid dictionary"),
        ({"outputs": {"globl": {}}}, r"models\[0\]\.outputs\.globl: .*did you mean 'global'"),
        ({"outputs": {"global": True}}, r"models\[0\]\.outputs\.global must be a valid dictionary"),
        ({"outputs": {"global": {"npz": True}}}, r"outputs\.global\.npz: .*did you mean 'npy'"),
        ({"outputs": {"grid": {"npy": "true"}}}, r"outputs\.grid\.npy must be a valid boolean, got 'true'"),
        ({"run": True}, r"models\[0\]\.run must be a valid dictionary"),
        ({"run": {"test_embeding": True}}, r"models\[0\]\.run\.test_embeding: .*did you mean 'test_embedding'"),
        ({"run": {"generate_denseft": 1}}, r"run\.generate_denseft must be a valid boolean, got 1"),
    ],
    ids=str,
)
def test_wrong_models_are_refused(tmp_path, fields, message):
    with pytest.raises(ImatchError, match=message):
        read(tmp_path, model(**fields))


def test_the_second_model_is_named(tmp_path):
    content = {**SMALL, "models": [*SMALL["models"], {"weights": "vitb16", "target_res": 256, "output": {}}]}
    with pytest.raises(ImatchError, match=r"models\[1\]\.output: .*did you mean 'outputs'"):
        read(tmp_path, content)


# --- by batch ---------------------------------------------------------------------------------------------


@pytest.fixture
def executed(monkeypatch):
    """What batch would have run; weight cxTiny fails."""
    calls = []

    def execute(notebook, values, exports):
        calls.append((notebook.stem, values, exports))
        return (
            "it broke"
            if values.get("weight", "").endswith("cxTiny")
            else Path("/done") / f"{notebook.stem}_{len(calls)}"
        )

    monkeypatch.setattr(batch, "execute", execute)
    return calls


def test_a_manifest_runs_point_by_point_past_one_that_fails(monkeypatch, tmp_path, executed):
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path / "results"))
    overrides = [("data_key", str(SHIPPED)), ("run", "mine")]
    recipe = batch.load(ROOT / "params" / "manifest.json", overrides, NOTEBOOKS)
    finished, failures = batch.run(recipe, NOTEBOOKS)
    assert list(finished) == ["weight=vits16 cfg=res256 variant=raw", "weight=vits16 cfg=res256 variant=sub2"]
    assert failures == [
        f"weight=cxTiny cfg=res256 variant={variant}: 01_embed: it broke" for variant in ("raw", "sub2")
    ]
    _, made = manifest.read(ROOT / "params" / "manifest.json", SHIPPED)
    for (_, values, _), point in zip(executed, made.values(), strict=True):
        assert (values["run"], values["dataset"]) == ("mine", "survey")
        assert values["resize"] == {"mode": "stretch", "long_side": point["resize.long_side"]}
        assert values["storage"] == {"variant": point["storage.variant"]}
        assert all(values[name] == point[name] for name in ("weight", "image_groups", "files"))
    assert {exports for _, _, exports in executed} == {tmp_path / "results"}


def test_references_read_the_step_before_them(tmp_path, executed, monkeypatch):
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path))
    path = ROOT / "params" / "manifestReference.json"
    recipe = batch.load(path, [("data_key", str(SHIPPED))], NOTEBOOKS)
    batch.run(recipe, NOTEBOOKS)
    (first, embed, exports), (second, references, _) = executed
    assert (first, second, exports) == ("01_embed", "02_references", tmp_path)
    assert "angles" not in embed
    views = {"angles": [0, 90, 180, 270], "crops": [1.0], "tag": "reference", "files": ["global.npy", "patch.npy"]}
    assert references == {"run": "manifest", "embed_step": "/done/01_embed_1", **views}


def test_the_command_line_wins_over_a_manifest(executed):
    overrides = [("data_key", str(SHIPPED)), ("weight", "vitb16"), ("storage.variant", "raw"), ("tag", "x")]
    recipe = batch.load(ROOT / "params" / "manifest.json", overrides, NOTEBOOKS)
    finished, failures = batch.run(recipe, NOTEBOOKS)
    assert [(values["weight"], values["storage"]["variant"], values["tag"]) for _, values, _ in executed] == [
        ("vitb16", "raw", "x")
    ]
    assert list(finished) == ["weight=vitb16 cfg=res256 variant=raw"]
    assert failures == []


def loaded(path, *overrides):
    recipe = batch.load(path, [("data_key", str(SHIPPED)), *overrides], NOTEBOOKS)
    return {label: {**recipe.parameters, **point} for label, point in recipe.points.items()}


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ([("resize.long_side", "512")], "res512"),
        ([("resize.mode", "crop")], "crop256"),
        ([("resize.mode", "scale"), ("resize.scale", "0.5")], "scale0p5"),
        ([("storage.cfg", "mine")], "mine"),
    ],
    ids=str,
)
def test_points_are_called_as_what_the_command_line_makes_of_them(overrides, size):
    found = loaded(ROOT / "params" / "manifestQuery.json", *overrides)
    assert list(found) == [f"weight=vits16 cfg={size} variant=raw"]
    assert [values.get("storage.cfg") for values in found.values()] == [{"mine": "mine"}.get(size)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            ("storage.cfg", "x"),
            r"weight=vits16 cfg=x variant=raw again, but with another resize.long_side \(512, not 256\)",
        ),
        (("weight", "vitb16"), "weight=vitb16 cfg=res256 variant=raw again, but with another files"),
        (("resize.long_side", "250"), "long_side 250 is not a multiple of patch 16"),
        (("resize.mode", "squeeze"), "resize.mode must be 'scale', .* or 'crop', got 'squeeze'"),
    ],
    ids=str,
)
def test_what_the_command_line_makes_of_points_is_checked_before_anything_runs(tmp_path, override, message):
    models = [
        {"weights": "vits16", "target_res": [256, 512]},
        {"weights": "cxTiny", "target_res": 256, "outputs": {"global": {"npy": True}}},
    ]
    path = write(tmp_path, {**SMALL, "models": models})
    with pytest.raises(ImatchError, match=message):
        loaded(path, override)
    assert list(loaded(path, ("storage.cfg", "x"), ("resize.long_side", "256"))) == [
        "weight=vits16 cfg=x variant=raw",
        "weight=cxTiny cfg=x variant=raw",
    ]


def test_a_tag_keeps_views_apart(tmp_path):
    models = [
        {"weights": weight, "target_res": 256, "image_groups": [{"folder": folder}]}
        for weight, folder in [("vits16", "flight01"), ("vitb16", "flight02")]
    ]
    path = write(tmp_path, {**SMALL, "models": models}, "manifestReference.json")
    assert [values["tag"] for values in loaded(path, ("tag", "x")).values()] == ["x", "x2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("wieght", "vits16")], "did you mean 'weight'"),
        ([("resize.long_side", "big")], "resize.long_side wants int"),
        ([("angles", "[0]")], "unknown parameter 'angles'"),
        ([("data_key", "absent.json")], r"no file .*absent\.json"),
    ],
    ids=str,
)
def test_overrides_are_checked(overrides, message):
    with pytest.raises(ImatchError, match=message):
        batch.load(ROOT / "params" / "manifest.json", [("data_key", str(SHIPPED)), *overrides], NOTEBOOKS)


def test_values_are_checked_against_the_notebooks(tmp_path):
    schema = batch.schema(NOTEBOOKS / "01_embed.ipynb")
    cell = "\n".join(f"{name} = {p.default!r}" for name, p in schema.items() if "." not in name)
    cell = cell.replace("image_groups = []", 'image_groups = ""')
    notebook = nbformat.read(NOTEBOOKS / "01_embed.ipynb", 4)
    notebook.cells = [nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})]
    nbformat.write(notebook, tmp_path / "01_embed.ipynb")
    with pytest.raises(ImatchError, match="image_groups wants str"):
        batch.load(write(tmp_path, SMALL), [("data_key", str(SHIPPED))], tmp_path)


@pytest.mark.parametrize("content", [{"models": []}, {"dataset_key": "survey", "modles": []}])
def test_what_looks_like_a_manifest_is_read_as_one(tmp_path, content):
    with pytest.raises(ImatchError, match=r"dataset_key is missing|did you mean 'models'"):
        batch.load(write(tmp_path, content), [], NOTEBOOKS)


def test_a_recipe_knows_no_points(tmp_path):
    with pytest.raises(ImatchError, match="unknown field 'points'"):
        batch.load(write(tmp_path, {"notebooks": ["01_embed"], "points": []}, "a.yaml"), [], NOTEBOOKS)


def test_a_wrong_manifest_exits_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = write(tmp_path, model(weights="vits61"))
    assert command("run", str(path), "--exports", str(tmp_path / "exports")) == 2
    assert "did you mean 'vits16'" in capsys.readouterr().err
    assert not (tmp_path / "exports").exists()
