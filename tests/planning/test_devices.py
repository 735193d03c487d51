"""The table of known GPUs: by the name that PyTorch reports, and by the one that people type."""

from __future__ import annotations

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.planning.gpus import KNOWN_GPUS, detected_device, named_device, peak_flops


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121.0),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Some GPU A1000", None),
        ("CPU, 2 threads", None),
    ],
)
def test_peaks_are_known_or_unknown_never_guessed(name: str, tflops: float | None) -> None:
    peak = peak_flops(name, "bfloat16")
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_float32_has_a_peak_of_its_own() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == pytest.approx(67e12)
    assert peak_flops("Tesla V100-SXM2-16GB", "float16") == pytest.approx(125e12)


def test_every_line_of_the_table_is_found_by_its_own_name_and_by_its_words() -> None:
    for gpu in KNOWN_GPUS:
        assert named_device(gpu.name).name == gpu.name
        assert named_device(f"NVIDIA {gpu.words.upper()}").name == gpu.name, "a line above hides it"


@pytest.mark.parametrize(
    "reported, name",
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("rtx 4090", "rtx-4090"),
        (" H200 ", "h200"),
    ],
)
def test_names_as_reported_and_as_typed(reported: str, name: str) -> None:
    assert named_device(reported).name == name


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("h1000", "did you mean h100"),
        ("foo", "no facts are known of it"),
        ("a100", "there are a100-40gb and a100-80gb"),
        ("rtx4090", "did you mean rtx-4090"),
        ("NVIDIA H200 MIG 1g.18gb", "not in the table"),
        ("", "not in the table"),
    ],
)
def test_a_name_that_is_not_there_is_an_error_with_what_is(wrong: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        named_device(wrong)
    assert "h100" in error.value.fix or "a100" in error.value.fix


def test_facts_of_a_named_device() -> None:
    device = named_device("h100")
    assert device.type == "cuda" and device.bfloat16
    assert device.memory_bytes == 79 * 2**30 and device.bandwidth == 3.35e12
    assert not named_device("t4").bfloat16 and "bfloat16" not in named_device("t4").peaks


def test_of_a_cpu_no_peak_is_known() -> None:
    device = detected_device(torch.device("cpu"))
    assert device.type == "cpu" and device.memory_bytes and not device.peaks and device.bandwidth is None
