"""The command line: `modelfleet`, and `kubectl modelfleet` where it is on the PATH."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from modelfleet_operator.api import InvalidResourcesError

app = typer.Typer(
    name="modelfleet",
    help="Many large models, each in several quantization variants, behind one OpenAI-compatible address.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
engine_app = typer.Typer(help="Engine environments of this machine.", no_args_is_help=True)
app.add_typer(engine_app, name="engine")

EXIT_INVALID = 2
Files = Annotated[
    list[Path], typer.Option("-f", "--filename", help="File or folder with resources; can be given again.")
]


def main() -> None:
    """Entry point: expected errors become one message, never a stack trace."""
    try:
        app()
    except InvalidResourcesError as error:
        for problem in error.problems:
            _complain(str(problem))
        sys.exit(EXIT_INVALID)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"[red]error:[/] {text}", soft_wrap=True, markup=True)


def _fail(text: str, code: int = 1) -> NoReturn:
    _complain(text)
    raise typer.Exit(code)


@app.command()
def up(
    files: Files,
    listen: Annotated[str, typer.Option(help="Address of the router.")] = "127.0.0.1:8000",
    state_dir: Annotated[Path | None, typer.Option(help="Where logs and state are kept.")] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the controller's log, too.")] = False,
) -> None:
    """Run the platform on this machine. Edits of the files are picked up; Ctrl-C ends everything."""
    from modelfleet_operator.clients.local_ray import LocalRayError
    from modelfleet_operator.clients.processes import ProcessFailedError
    from modelfleet_operator.local import LocalPlatform, UpError
    from modelfleet_operator.local_state import AlreadyRunningError, LocalState
    from modelfleet_operator.local_store import STDIN
    from modelfleet_operator.logs import set_up_logging

    if STDIN in files:
        _fail("-f -: `modelfleet up` follows its files, and standard input ends: give a file", EXIT_INVALID)
    set_up_logging("INFO" if verbose else "WARNING")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    platform = LocalPlatform(files, listen, LocalState(state_dir), console.print)
    try:
        asyncio.run(platform.run())
    except* (UpError, AlreadyRunningError, ProcessFailedError, LocalRayError) as group:
        _fail("; ".join(str(e) for e in group.exceptions))


@app.command()
def plan(
    files: Annotated[
        list[Path] | None, typer.Option("-f", "--filename", help="File or folder; - reads standard input.")
    ] = None,
    pool: Annotated[list[Path] | None, typer.Option("--pool", help="File with the ServingPool.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Compare all accelerators for a source.")
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="table, json or yaml.")] = "table",
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic.")] = False,
) -> None:
    """Say which variant fits which accelerator, and why not. Creates nothing.

    Exits 0 when everything fits, 1 when something doesn't, 2 when the input is wrong.
    """
    from modelfleet_operator.local_store import STDIN
    from modelfleet_operator.plan_command import PlanOptions, run_plan

    if bool(files) == bool(model):
        _fail("give either -f FILE or --model SOURCE", EXIT_INVALID)
    if output not in ("table", "json", "yaml"):
        _fail(f"-o {output}: use table, json or yaml", EXIT_INVALID)
    if [*(files or ()), *(pool or ())].count(STDIN) > 1:
        _fail("standard input can be read only once: give - once", EXIT_INVALID)
    raise typer.Exit(asyncio.run(run_plan(PlanOptions(files or [], pool or [], model, output, explain))))


@app.command()
def get(
    name: Annotated[str | None, typer.Argument(help="A ModelDeployment; all without.")] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="table, wide, json or yaml.")] = "table",
    state_dir: Annotated[Path | None, typer.Option(help="Of the `modelfleet up` to ask.")] = None,
) -> None:
    """Show what `modelfleet up` runs on this machine."""
    from modelfleet_operator.get_command import render
    from modelfleet_operator.local_state import LocalState, NotRunningError

    if output not in ("table", "wide", "json", "yaml"):
        _fail(f"-o {output}: use table, wide, json or yaml", EXIT_INVALID)
    try:
        info = LocalState(state_dir).read()
    except NotRunningError as error:
        _fail(str(error))
    documents = [d for d in info.deployments if name in (None, d["metadata"]["name"])]
    if name is not None and not documents:
        known = ", ".join(d["metadata"]["name"] for d in info.deployments) or "none"
        _fail(f"no ModelDeployment {name}; there are: {known}")
    render(documents, output, one=name is not None)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="MODEL or MODEL:VARIANT.")],
    prompt: Annotated[str | None, typer.Argument(help="One question; a conversation without.")] = None,
    url: Annotated[str | None, typer.Option(help="Router; default: the running `modelfleet up`.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MODELFLEET_API_KEY", help="Key of the router.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    state_dir: Annotated[Path | None, typer.Option(help="Of the `modelfleet up` to ask.")] = None,
) -> None:
    """Talk with a model."""
    from modelfleet_operator.chat_command import ChatError, converse
    from modelfleet_operator.local_state import LocalState, NotRunningError

    try:
        base = url or LocalState(state_dir).read().router
        asyncio.run(converse(base.removesuffix("/v1"), model, prompt, api_key, max_tokens))
    except (ChatError, NotRunningError) as error:
        _fail(str(error))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def router(context: typer.Context) -> None:
    """Run the OpenAI router; `modelfleet router --help` lists its options."""
    _become("modelfleet_serving.router", context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def key(context: typer.Context) -> None:
    """Make an API key of the router; `modelfleet key --help` lists its options."""
    _become("modelfleet_serving.router.new_key", context.args)


@app.command()
def operator() -> None:
    """Run the Kubernetes operator."""
    from modelfleet_operator.main import run

    run()


@app.command()
def crds(
    apply: Annotated[bool, typer.Option("--apply", help="Apply them to the cluster, server-side.")] = False,
) -> None:
    """Print this release's CustomResourceDefinitions, or bring a cluster's up to date."""
    from modelfleet_operator.api.crd import render

    if not apply:
        sys.stdout.write("---\n".join(render().values()))
        return
    from kubernetes.aio.config import ConfigException

    from modelfleet_operator.clients.errors import ClientError
    from modelfleet_operator.crds_command import apply_crds

    try:
        for name in asyncio.run(apply_crds()):
            Console(highlight=False).print(f"customresourcedefinition {name} applied")
    except (ClientError, ConfigException) as error:
        _fail(str(error))


@engine_app.command("install")
def engine_install(
    engine: Annotated[str, typer.Argument(help="vllm or sglang.")],
    version: Annotated[str | None, typer.Option(help="Version; default: the tested one.")] = None,
    force: Annotated[bool, typer.Option(help="Make it anew.")] = False,
) -> None:
    """Make an environment with an engine for this machine (CPU or CUDA)."""
    options = [*(["--version", version] if version else []), *(["--force"] if force else [])]
    _become("modelfleet_serving.environments", ["install", engine, *options])


@engine_app.command("list")
def engine_list() -> None:
    """List the engine environments of this machine."""
    _become("modelfleet_serving.environments", ["list"])


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(package_version("modelfleet") + "\n")


def _become(module: str, arguments: Sequence[str]) -> NoReturn:
    """Go on as another module: serving is a program beside the operator, not a library of it."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    main()
