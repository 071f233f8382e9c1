"""`optgptq bench` on the bundled model: that it measures, not how fast this machine is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optgptq.evaluation import bench as bench_module
from optgptq.evaluation.bench_report import BenchSettings
from optgptq_cli.main import main

SMALL = ["bundled:story-llama", "--requests", "3", "--prompt-tokens", "20:40", "--new-tokens", "5", "--rounds", "2"]
SMALL += ["--set", "max_running=4", "--set", "max_length=64"]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """Measure the bandwidth with a buffer that is there in no time."""
    measure = bench_module.measure_bandwidth
    monkeypatch.setattr(bench_module, "measure_bandwidth", lambda device: measure(device, num_bytes=1 << 20))


def test_json_has_every_figure(capsys):
    assert main(["bench", *SMALL, "--shared-prefix", "17", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert (report["model"], report["device"], report["dtype"]) == ("bundled:story-llama", "cpu", "float32")
    assert report["settings"]["prompt_sizes"] == [20, 40]
    assert report["check"]["num_tokens"] == 24
    assert set(report["speeds"]) >= {"prefill", "token_p50", "token_p99", "new_tokens", "first_token_p99", "gap_p50"}
    for spread in report["speeds"].values():
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    needed = report["bytes_per_token"]
    assert needed["total"] == needed["linears"] + needed["head"] + needed["cache"] + needed["rest"]
    seconds = needed["total"] / report["bandwidth"]["bytes_per_second"]
    assert report["floor_share"] == pytest.approx(seconds / report["speeds"]["token_p50"]["median"])
    pages = report["pages"]
    assert 0 < pages["peak_bytes"] <= pages["total_bytes"]
    assert 0 < pages["waste_ratio"] < 0.5
    # One page of 16 of the 17 tokens, by two of three texts, or none where all began in the same step.
    assert pages["prefix_hit_tokens"] in range(0, 2 * 2 * 16 + 1, 16)
    assert 2 * 3 * 20 <= pages["prompt_tokens"] <= 2 * 3 * 40
    assert report["peak_memory_bytes"] > 10**7
    assert report["peak_device_bytes"] is None


def test_people_get_a_table(capsys):
    assert main(["bench", *SMALL, "--skip-check", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["check"].endswith("skipped")
    assert "tokens/s" in lines["3 texts, new tokens"]
    assert "1 MiB, the best of 5" in lines["memory moves"]
    assert lines["so it is at"].endswith("% of what that allows")
    assert "keys and values" in lines["it must read"]


def test_caches_side_by_side(capsys):
    short = ["--rounds", "1", "--json", "--quiet", "--past-only", "token"]
    assert main(["bench", *SMALL, "--kv-cache", "16,4,8", *short]) == 0
    out, err = capsys.readouterr()
    assert "past_only" not in err
    runs = json.loads(out)["runs"]
    assert [run["cache"]["choice"] for run in runs] == ["16", "4", "8"]
    assert [run["cache"]["past_only"] for run in runs] == [None, "token", "token"]
    # Six layers of two heads of 32 numbers: float32, or codes with 4 bytes of scale and minimum.
    assert [run["cache"]["bytes_per_token"] for run in runs] == [6 * 2 * 2 * size for size in (128, 20, 36)]
    assert [run["cache"]["key_bits"] for run in runs] == [32, 5, 9]
    assert runs[1]["cache"]["exact_bytes"] > 0 == runs[2]["cache"]["exact_bytes"]
    # The same prompts for all.
    assert len({run["pages"]["prompt_tokens"] for run in runs}) == 1
    assert all(run["check"]["num_tokens"] == 24 for run in runs)
    plain, four = (run["bytes_per_token"] for run in runs[:2])
    context = plain["context"]
    assert plain["cache"] == 6 * 2 * 2 * 128 * context
    # First and last tokens are read exactly.
    assert four["cache"] == 6 * 2 * 2 * (20 * 128 + (context - 20) * 20)


def test_people_get_a_line_for_each_cache(capsys):
    assert main(["bench", *SMALL, "--rounds", "1", "--skip-check", "--quiet", "--kv-cache", "16,3"]) == 0
    out, _ = capsys.readouterr()
    header, plain, three = out.splitlines()[:3]
    assert header.startswith("KV cache  past-only")
    # Codes alone would promise more than exact pages leave.
    assert "tokens/GiB" not in header
    assert "tokens that fit" in header
    assert plain.split()[:2] == ["16", "-"]
    assert three.split()[:4] == ["3", "chunk", "4.00,", "4.00"]
    assert "--json has all figures." in out


@pytest.mark.parametrize(
    ("options", "sizes", "num_new"),
    [
        ([], [48, 48], 16),
        (["--new-tokens", "20"], [44, 44], 20),
        (["--prompt-tokens", "20:40"], [20, 40], 24),
    ],
)
def test_sizes_that_nobody_gave_fit_the_model(options, sizes, num_new, capsys):
    arguments = [SMALL[0], "--set", "max_length=64", "--requests", "2", "--rounds", "1", "--skip-check"]
    assert main(["bench", *arguments, *options, "--json", "--quiet"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["prompt_sizes"], settings["num_new_tokens"]) == (sizes, num_new)


@given(
    low=st.integers(1, 300),
    more=st.integers(0, 300),
    num_new=st.integers(2, 300),
    max_length=st.integers(2, 600),
    prompts=st.booleans(),
    new_tokens=st.booleans(),
)
def test_cut_sizes_fit_and_those_that_fit_stay(low, more, num_new, max_length, prompts, new_tokens):
    settings = BenchSettings(prompt_sizes=(low, low + more), num_new_tokens=num_new)
    cut = settings.cut(max_length, prompts=prompts, new_tokens=new_tokens)
    if settings.longest <= max_length:
        assert cut == settings
    if prompts and new_tokens and max_length >= 8:
        assert cut.longest <= max_length
    assert prompts or cut.prompt_sizes == settings.prompt_sizes
    assert new_tokens or cut.num_new_tokens == settings.num_new_tokens


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prompt-tokens", "40:20"], "A at most B"),
        (["--prompt-tokens", "0"], "A:B, 1 or more"),
        (["--prompt-tokens", "few"], "A:B or one number"),
        (["--prompt-tokens", "5:"], "A:B or one number"),
        (["--new-tokens", "1"], "2 or more"),
        (["--requests", "0"], "--requests"),
        (["--rounds", "0"], "--rounds"),
        (["--shared-prefix", "20"], "fewer than 20 tokens"),
        (["--new-tokens", "30"], "at most 64 tokens together"),
        (["--new-tokens", "30"], "--prompt-tokens 20:40 --new-tokens 16"),
        (["--kv-cache", "16,5"], "each once, of checkpoint, 16, 8, 4, 3, 2"),
        (["--kv-cache", "4,4"], "each once"),
        (["--kv-cache", "4", "--past-only", "recent"], "window:N"),
        (["--kv-cache", "4", "--deterministic"], "Set past_only to token or window:N."),
        (["--set", "max_runing=4"], "the nearest is max_running"),
    ],
)
def test_what_cannot_be_measured(arguments, text, capsys):
    assert main(["bench", *SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""
