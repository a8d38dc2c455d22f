"""The application that commands register with."""

from __future__ import annotations

from typing import Annotated

import typer

from robustdice import __version__

app = typer.Typer(
    name="robustdice",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a pretrained CNN on a handful of unreliable devices, so that answers keep coming while devices fail.\n\n"
    "In the workshop: [bold]inspect[/] a model, [bold]score[/] its neurons, make a [bold]plan[/], [bold]evaluate[/] "
    "what accuracy failures leave, [bold]build[/] a bundle per device and [bold]verify[/] it. On the devices: "
    "[bold]device[/] runs one, [bold]up[/] runs all of them here, [bold]infer[/] asks them. "
    "To see all of it in a minute: [bold]robustdice demo[/].",
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"robustdice {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="say the version, and end")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
