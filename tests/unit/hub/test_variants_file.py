"""``variants.toml``: written and read back, joined with ``model.toml``, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.bundles.manifest import Compare
from tests.fakes.hub import make_source
from tools.hub import toml, variants_file
from tools.hub.description import load, load_own
from tools.hub.errors import SourceError
from tools.hub.variant_source import VariantSource
from tools.hub.variants_file import FILE_NAME, MadeVariants

pytestmark = pytest.mark.unit
RULES = (Compare(output="y", metric="cosine", min=0.5), Compare(output="y", metric="max_abs", atol=0.25))
MADE = MadeVariants(
    variants=(
        VariantSource(
            id="cpu-int8-static", entry="int8-static/model.onnx", precision="int8", priority=9,
            quant={"scheme": "qdq", 'odd "key"': 'with "quotes" and \\ and ü'}, metrics={"agreement": 0.5},
        ),
    ),
    golden={"g1": {"cpu-int8-static": RULES}},
)  # fmt: skip


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    variants_file.write(tmp_path, MADE)
    assert variants_file.read(tmp_path) == MADE
    variants_file.write(tmp_path, MadeVariants())
    assert not (tmp_path / FILE_NAME).exists()
    assert variants_file.read(tmp_path) == MadeVariants()


def test_made_variants_join_a_persons_own(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    variants_file.write(source, MADE)
    joined = load(source / "model.toml")
    assert [variant.id for variant in joined.variants] == ["cpu-fp32", "cpu-int8-static"]
    assert joined.golden[0].per_variant == {"cpu-int8-static": RULES}
    assert load_own(source / "model.toml").golden[0].per_variant == {}


def test_a_persons_tolerance_wins(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    variants_file.write(source, MADE)
    with (source / "model.toml").open("a") as file:
        file.write('\n[golden.per_variant]\ncpu-int8-static = [{ output = "y", metric = "max_abs", atol = 9.0 }]\n')
    assert load(source / "model.toml").golden[0].per_variant["cpu-int8-static"][0].atol == 9.0


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (MadeVariants(variants=(VariantSource(id="cpu-fp32", entry="x", precision="int8", priority=1),)), "too"),
        (MadeVariants(variants=MADE.variants, golden={"g2": {}}), "no golden sample 'g2'"),
    ],
)
def test_files_that_contradict_each_other_are_refused(made: MadeVariants, words: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    variants_file.write(source, made)
    with pytest.raises(SourceError, match=words):
        load(source / "model.toml")


def test_a_damaged_file_says_how_to_make_it_anew(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("[[variants]]\nname = 1\n")
    with pytest.raises(SourceError) as caught:
        variants_file.read(tmp_path)
    assert "inferhub quantize" in caught.value.hint


def test_toml_has_no_word_for_some_values() -> None:
    with pytest.raises(SourceError, match="TOML"):
        toml.value({"x": None})
    with pytest.raises(SourceError, match="TOML"):
        toml.value(float("nan"))
