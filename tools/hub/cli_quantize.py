"""The verb ``quantize``: options in, table out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.table import Table

from agent.cli_text import human_bytes
from agent.errors import InvalidInputError
from tools.hub.cli import console_width, emit, json_option, progress, wants_json
from tools.hub.cli_store import parse_model
from tools.hub.description import FILE_NAME
from tools.hub.errors import SourceError
from tools.hub.gate import Gate

if TYPE_CHECKING:  # imported by the verb itself: a runtime and its quantizer take half a second
    from tools.hub.cli import RichListener
    from tools.hub.quantize_job import Wish
    from tools.hub.quantize_result import Report, Row

_KINDS: Final = ("fp16", "dynamic", "static")
_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option("--out", type=_PATH, metavar="DIR", help="Folder of sources to make; only if SOURCE is a model.")
@click.option("--model", metavar="TEAM/NAME@VERSION", help="What to call it in DIR/model.toml.")
@click.option("--kinds", default=",".join(_KINDS), show_default=True, metavar="A,B", help="What to make.")
@click.option("--base", metavar="VARIANT", help="The fp32 variant to begin from.  [default: the first]")
@click.option("--inputs", type=_PATH, metavar="PATH", help="Real inputs to measure with.  [default: the golden ones]")
@click.option("--calibration", type=_PATH, metavar="PATH", help="Real inputs to calibrate static int8 with.")
@click.option(
    "--min-agreement", type=float, default=0.99, show_default=True, help="With fp32, in the output's measure."
)
@click.option("--agreement", "measure_of", type=click.Choice(["auto", "top1", "cosine"]), default="auto",
              show_default=True, help="The measure for outputs of floating point.")  # fmt: skip
@click.option("--max-abs", type=float, metavar="X", help="Largest difference of any output value.")
@click.option("--min-speedup", type=float, metavar="X", help="Drop what is not X times as fast as fp32.")
@click.option("--max-slowdown", type=float, metavar="X", help="Drop what is more than X times as slow as fp32.")
@click.option("--max-size-ratio", type=float, metavar="X", help="Drop what is larger than X times fp32.")
@click.option("--max-memory-ratio", type=float, metavar="X", help="Drop what takes more than X times fp32's memory.")
@click.option("--operators", default="", metavar="A,B", help="int8 only these, for example MatMul.  [default: all]")
@click.option("--exclude", multiple=True, metavar="NODE", help="Leave this node in fp32; may be repeated.")
@click.option("--weights", type=click.Choice(["int8", "uint8"]), default="int8", show_default=True)
@click.option("--per-channel/--per-tensor", default=True, show_default=True, help="Scales of int8 weights.")
@click.option("--reduce-range/--full-range", default=None,
              help="7 or 8 bits of int8 weights.  [default: 7 where this CPU overflows: x86 without VNNI]")  # fmt: skip
@click.option("--calibration-method", type=click.Choice(["minmax", "entropy", "percentile"]), default="minmax",
              show_default=True)  # fmt: skip
@click.option("--rows", type=click.IntRange(1, 100_000), default=256, show_default=True, help="Inputs to run at most.")
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=6.0, show_default=True, help="Timing per model.")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Of the runtime, timing.")
@json_option
def quantize(source: str, out: Path | None, model: str | None, **options: Any) -> None:
    """Make fp16 and int8 variants of an fp32 model, measure them, and keep those that are worth it.

    SOURCE is a folder with model.toml, whose fp32 variant is taken; or an ONNX file; or, with torch installed, an
    exported program (.pt2), a TorchScript file or module:factory, from which --out DIR is made. Each variant is
    compared with fp32 on this machine: latency in turns, size, memory of a process of its own, answers to the inputs.
    Those that pass go into the folder and into its variants.toml, with the golden tolerances that were measured;
    inferhub pack takes them from there.

    Inputs are .npz or .safetensors files (arrays named as the model's inputs, first axis = rows), .npy or raw files
    for a model with one input, or a folder of any of these.

    \b
    Example: inferhub quantize digits.onnx --out digits --inputs test.npz --calibration train.npz \\
                 --min-agreement 0.99 --max-slowdown 1.0
             inferhub quantize my-model --kinds dynamic --operators MatMul --max-size-ratio 0.5
    """
    gate = Gate(**{name: options.pop(name) for name in
                   ("min_agreement", "max_abs", "min_speedup", "max_slowdown", "max_size_ratio",
                    "max_memory_ratio")})  # fmt: skip
    from tools.hub.quantize import quantize as run

    wish = _wish(gate, options)
    with progress() as bars, _undone_if_failed(out):
        folder = _sources(source, out, model, wish, bars)
        report = run(folder, replace(wish, made_up=wish.inputs is None and folder == out), bars)
    if wants_json():
        emit(_plain(report))
    else:
        _print(report)


@contextmanager
def _undone_if_failed(out: Path | None) -> Iterator[None]:
    """Leave no new folder behind that was not finished: the same command can then be given again."""
    existed = out is None or out.exists()
    try:
        yield
    except BaseException:
        if out is not None and not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _wish(gate: Gate, options: Mapping[str, Any]) -> Wish:
    from tools.hub.convert import Int8, saturates
    from tools.hub.measure import Effort
    from tools.hub.quantize_job import Wish

    kinds = [kind for kind in options["kinds"].split(",") if kind]
    if unknown := [kind for kind in kinds if kind not in _KINDS]:
        raise InvalidInputError(f"--kinds {unknown[0]}: there are {', '.join(_KINDS)}")
    if not kinds:
        raise InvalidInputError("--kinds: name at least one")
    reduce_range = options["reduce_range"]
    return Wish(
        kinds=tuple(dict.fromkeys(kinds)),
        how=Int8(
            operators=tuple(name for name in options["operators"].split(",") if name),
            exclude=options["exclude"],
            weights=options["weights"],
            per_channel=options["per_channel"],
            reduce_range=saturates() and options["weights"] == "int8" if reduce_range is None else reduce_range,
            calibration=options["calibration_method"],
        ),
        gate=gate,
        measure_of=options["measure_of"],
        base=options["base"] or "",
        inputs=options["inputs"],
        calibration=options["calibration"],
        rows=options["rows"],
        effort=Effort(seconds_max=options["seconds"], threads=options["threads"]),
    )


def _sources(source: str, out: Path | None, model: str | None, wish: Wish, bars: RichListener) -> Path:
    """Return the folder to work on; made from a model if that is what was given."""
    if Path(source).is_dir():
        if out is not None or model is not None:
            raise InvalidInputError(f"{source} is a folder: its variants go into it, --out and --model name a new one")
        if not (Path(source) / FILE_NAME).is_file():
            raise SourceError(
                f"{source}: no {FILE_NAME} here", hint="Write one (inferhub pack --help), or give a model."
            )
        return Path(source)
    from tools.hub import scaffold, torch_export
    from tools.hub.onnxfile import described
    from tools.hub.samples import load, peek, random

    kind = torch_export.kind_of(source)
    if out is None:
        raise InvalidInputError("--out DIR: where shall the sources of the new bundle go?")
    team, name, version = parse_model(model or f"team/{scaffold.name_of(source)}@1.0.0")
    with tempfile.TemporaryDirectory(prefix="inferhub-export-") as scratch:
        fp32 = Path(source)
        if kind != "onnx":
            bars.stage("export to ONNX", 1, "steps")
            fp32 = Path(scratch, "model.onnx")
            torch_export.export(source, kind, fp32, peek(wish.inputs) if wish.inputs else None)
            bars.advance(1)
        ports = described(fp32).inputs
        given = load(wish.inputs, ports, rows_max=wish.rows) if wish.inputs else random(ports)
        scaffold.make(fp32, out, given, scaffold.Title(team, name, version or "1.0.0"))
    return out


def _plain(report: Report) -> dict[str, Any]:
    return {
        "folder": str(report.folder),
        "samples": report.samples,
        "real_inputs": report.real_inputs,
        "calibrated_with": report.calibrated_with,
        "variants": [_plain_row(row) for row in report.rows],
    }


def _plain_row(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "id": row.id, "kind": row.kind, "kept": row.kept, "reasons": list(row.reasons), "note": row.note,
        "bytes": row.size_bytes,
    }  # fmt: skip
    if row.measured is not None:
        names = ("load_ms", "p50_ms", "p99_ms", "runs", "peak_bytes", "growth_bytes")
        plain |= {name: getattr(row.measured, name) for name in names}
    if row.figures is not None:
        plain |= {name: value for name, value in asdict(row.figures).items() if name != "agreement_of"}
        plain["outputs"] = [asdict(one) for one in row.agreement]
    return plain


def _print(report: Report) -> None:
    table = Table(box=None, pad_edge=False)
    for column, justify in (("variant", "left"), ("size", "right"), ("median", "right"), ("p99", "right"),
                            ("speed", "right"), ("peak RSS", "right"), ("agreement", "right"), ("cosine", "right"),
                            ("max diff", "right"), ("", "left")):  # fmt: skip
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in report.rows:
        table.add_row(*_cells(row))
    Console(width=console_width()).print(table)
    for row in report.rows:
        if row.note:
            click.echo(f"  {row.id}: {row.note}")
        for reason in row.reasons:
            click.echo(f"  {row.id} was left out: {reason}")
    inputs = f"{report.samples} {'real' if report.real_inputs else 'made-up'} inputs"
    calibrated = f", calibrated with {report.calibrated_with}" if report.calibrated_with else ""
    click.echo(f"{inputs}{calibrated}, one at a time, in turns")
    if not report.real_inputs:
        click.secho("made-up inputs say little about agreement: give --inputs", fg="yellow")
    kept = ", ".join(row.id for row in report.kept) or "nothing"
    click.echo(f"added to {report.folder}: {kept}")
    click.echo(f"pack it with: inferhub pack {report.folder} --out BUNDLE")


def _cells(row: Row) -> list[str]:
    if row.measured is None:
        return [row.id, human_bytes(row.size_bytes) if row.size_bytes else "-", *["-"] * 7, "left out"]
    found, figures = row.measured, row.figures
    cells = [row.id, human_bytes(row.size_bytes), f"{found.p50_ms:.3g} ms", f"{found.p99_ms:.3g} ms"]
    if figures is None:
        return [*cells, "", human_bytes(found.peak_bytes), "", "", "", "measured against"]
    cosines = [one.cosine for one in row.agreement if one.cosine is not None]
    return [
        *cells,
        f"x {figures.speedup:.2f}",
        human_bytes(found.peak_bytes),
        f"{figures.agreement:.4f} {figures.agreement_of.partition(' ')[0]}",
        f"{min(cosines):.5f}" if cosines else "-",
        "-" if figures.max_abs is None else f"{figures.max_abs:.2g}",
        "kept" if row.kept else "left out",
    ]
