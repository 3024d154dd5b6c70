from __future__ import annotations

import pytest

from modelfleet_serving.simulator import capacity, cli
from modelfleet_serving.simulator.capacity import Load, simulate

CONFIG = cli.parse(["--model", "m", "--profile", "a100-80g-7b-bf16"])
LOAD = Load(rate=8, prompt_tokens=800, output_tokens=100, shared_tokens=320, seconds=20)


def test_an_idle_replica_answers_as_fast_as_its_profile_says() -> None:
    load = Load(rate=0.1, prompt_tokens=500, output_tokens=50, seconds=300)
    result = simulate(CONFIG, load, 4)
    assert result.unfinished == 0
    assert result.gap_p95 == pytest.approx(
        CONFIG.speed.decode_base + CONFIG.speed.decode_per_sequence, rel=0.05
    )
    assert result.first_token_p50 < 0.1
    assert result.batch == pytest.approx(1, abs=0.1)


def test_more_replicas_are_never_slower_and_the_same_load_is_the_same() -> None:
    few, more = simulate(CONFIG, LOAD, 1), simulate(CONFIG, LOAD, 3)
    assert few == simulate(CONFIG, LOAD, 1)
    assert few.requests == more.requests == pytest.approx(160, rel=0.25)
    assert more.first_token_p95 < few.first_token_p95
    assert more.gap_p95 < few.gap_p95
    assert more.batch < few.batch


def test_a_shared_beginning_saves_prefill() -> None:
    cold = simulate(CONFIG, Load(rate=8, prompt_tokens=800, output_tokens=100, seconds=20), 1)
    warm = simulate(CONFIG, LOAD, 1)
    assert cold.cache_hits == 0
    assert 0.25 < warm.cache_hits < 0.5
    assert warm.first_token_p95 < cold.first_token_p95


def test_overload_is_seen() -> None:
    result = simulate(CONFIG, Load(rate=200, prompt_tokens=2000, output_tokens=200, seconds=4), 1)
    assert result.unfinished > 0
    assert result.first_token_p95 > 1


def test_the_command_stops_at_the_first_number_that_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--profile", "a100-80g-7b-bf16", "--rate", "4", "--seconds", "10", "--prompt-tokens", "300"]
    assert capacity.main([*options, "--max-num-seqs", "64"]) == 0
    assert capsys.readouterr().out.endswith("1 replicas of a100-80g-7b-bf16 are enough (simulated).\n")
    assert capacity.main([*options, "--gap-ms", "1", "--max-replicas", "2"]) == 1
    assert "2 replicas are not enough" in capsys.readouterr().out
