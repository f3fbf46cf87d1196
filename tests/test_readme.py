"""The README's snippets run as they are written, on fewer images and for fewer steps."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.conftest import child_environment

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)

# What a snippet says, and what is run in its place: each of them must still be there.
SMALLER = {
    'jr.data.load("mnist5k")': 'jr.data.load("mnist5k").take(slice(64))',
    'jr.data.load("mnist5k", "test")': 'jr.data.load("mnist5k", "test").take(slice(16))',
    "model = jr.models.small_cnn()": (
        "model = jr.models.small_cnn(channels=(4,), strides=(4,), dense=(8,))"
    ),
    "epochs=10": "epochs=1",
    "few = slice(100)": "few = slice(4)",
    "samples=1_000": "samples=20",
    "widths=(16, 32), latent_channels=8": "widths=(4,), latent_channels=4",
    "jr.data.load_emoji_pairs()": "jr.data.load_emoji_pairs().take(slice(48))",
    "channels=(16, 32), strides=(2, 2), dense=()": "channels=(4,), strides=(4,), dense=()",
    "jr.safeclip.recommended()": (
        "jr.safeclip.recommended(batch_size=8, epochs=4, pool=8, warmup=2)"
    ),
}
# The suite in few steps, before the snippets name it.
PREAMBLE = """
from experiments import common
from jaxrobust.evaluation import evaluator
evaluator.attacks_of = lambda version, *threat: common.suite_of(5, steps=2, targets=2)(*threat)
"""


def smaller(text):
    for said, run in SMALLER.items():
        text = text.replace(said, run)
    return text


@pytest.mark.parametrize("said", SMALLER)
def test_what_is_made_smaller_is_in_the_readme(said):
    assert any(said in snippet for snippet in SNIPPETS)


@pytest.mark.slow
def test_the_snippets_run_one_after_the_other(tmp_path):
    program = "\n".join([PREAMBLE, *map(smaller, SNIPPETS)])
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", program],
        cwd=tmp_path,
        env=child_environment(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "runs" / "report" / "report.json").exists()
    assert "worst case" in run.stdout


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "experiments" / "results" / "README.md"],
    ids=lambda path: path.parent.name,
)  # fmt: skip
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_commands_name_experiments_and_presets_that_there_are():
    import importlib

    for name, rest in re.findall(r"python -m experiments\.(\w+)([^`#\n]*)", TEXT):
        if name == "NAME":
            continue
        module = importlib.import_module(f"experiments.{name}")
        for preset in re.findall(r"--preset (\w+)", rest):
            assert preset in module.PRESETS, (name, preset)
