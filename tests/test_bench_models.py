"""``fbackprop bench models``: sides that compute the same, rows with their keys, what is refused."""

import importlib.util
import json

import pytest

from fbackprop.cli import main
from fbackprop.loading import Refusal
from fbackprop.measuring import steps
from fbackprop.measuring.twins import MODELS, Side, flax_side

KEYS = {
    "model", "variant", "against", "time_ratio", "time_ratio_low", "time_ratio_high", "compile_ratio", "temp_bytes",
    "temp_bytes_against", "loss_difference",
}  # fmt: skip

TINY = {
    "cnn": MODELS["cnn"].scaled((2, 28, 28, 1)),
    "gpt": MODELS["gpt"].scaled((2, 8), vocabulary=11, layers=1, width=16, heads=2, length=8),
    "lstm": MODELS["lstm"].scaled((2, 5), vocabulary=11, width=8),
    "resnet": MODELS["resnet"].scaled((2, 8, 8, 3), depths=(1, 1), features=(4, 8), classes=3),
}
TORCH = ("torch",) if importlib.util.find_spec("torch") else ()


@pytest.mark.parametrize("name", ["lstm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cnn", "gpt", "resnet"))])
def test_all_sides_compute_the_same(name):
    rivals = ("flax dots_saveable", "equinox checkpoint", *TORCH)
    rows = steps.measure(TINY[name], steps.Plan(rivals, rounds=1), {})
    assert {(r["variant"], r["against"]) for r in rows} == {(v, a) for v in ("ours", "accelerated") for a in rivals}
    for row in rows:
        assert set(row) >= KEYS
        assert row["loss_difference"] < 2e-5, row
    assert "loss apart" in str([c.header for c in steps.table(rows).columns])


def test_a_side_that_computes_something_else_is_refused(monkeypatch):
    real = flax_side.flax_side

    def wrong(*args):
        side = real(*args)

        def loss(params, state, batch):
            value, state = side.loss(params, state, batch)
            return 1.01 * value, state

        return Side(loss, side.params, side.state)

    monkeypatch.setattr(flax_side, "flax_side", wrong)
    monkeypatch.setattr(steps, "VARIANTS", ("ours",))
    with pytest.raises(Refusal, match=r"the losses of lstm in flax are \[.*\], ours are \["):
        steps.measure(TINY["lstm"], steps.Plan(("flax",), rounds=1), {})


def test_the_command_writes_rows_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "lstm", TINY["lstm"])
    monkeypatch.setattr(steps, "VARIANTS", ("ours",))
    arguments = [
        "lstm",
        "--against",
        "flax",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "m.json"),
        "--plot",
        str(tmp_path / "m.png"),
    ]
    assert main(["bench", "models", *arguments]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert set(found) == {"device", "versions", "rows"}
    assert found["rows"][0]["model"] == "lstm"
    assert (tmp_path / "m.png").stat().st_size > 10_000
    assert "lstm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["gpd"], "there is no model 'gpd'"), (["--against", "flux"], "there is no rival 'flux'")],
)
def test_unknown_names_get_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "models", *arguments])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
