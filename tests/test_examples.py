"""Every script in examples/ runs, as a user would start it; the one that checks itself also fails where it should."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
SLOW = ("accelerate_flax.py", "attributions.py")  # which train for a while; what they use has tests of its own
OTHERS = [
    pytest.param(path, id=path.name, marks=pytest.mark.slow if path.name in SLOW else ())
    for path in sorted(EXAMPLES.glob("*.py"))
    if path.name != "by_hand.py"
]


def run(*command):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", OTHERS)
def test_runs(script):
    done = run(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_by_hand_agrees_and_learns():
    done = run(EXAMPLES / "by_hand.py")
    assert done.returncode == 0, done.stdout + done.stderr
    differences = [float(d) for d in re.findall(r"(\d\.\de-\d+|0\.0e\+00)$", done.stdout, re.M)]
    assert len(differences) == 3
    assert max(differences) <= 1e-12
    assert float(re.search(r"accuracy ([\d.]+)%", done.stdout)[1]) > 80


def test_by_hand_notices_a_wrong_backward(tmp_path):
    """A dense backward that is off by a millionth must not pass."""
    sabotage = (
        "import runpy, sys\n"
        "import fbackprop.layers as layers\n"
        "original = layers.Dense.backward\n"
        "def wrong(self, tape, dy):\n"
        "    dparams, dx = original(self, tape, dy)\n"
        "    return dparams, dx * (1 + 1e-6)\n"
        "layers.Dense.backward = wrong\n"
        "sys.argv = ['by_hand.py', '--steps', '3']\n"
        f"runpy.run_path({str(EXAMPLES / 'by_hand.py')!r}, run_name='__main__')\n"
    )
    script = tmp_path / "wrong.py"
    script.write_text(sabotage)
    done = run(script)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "largest difference" in done.stdout
