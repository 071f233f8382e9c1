"""A view with replaced tensors reads them, and everything else from its source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optgptq.checkpoint.folder import SINGLE_FILE, CheckpointFolder
from optgptq.checkpoint.source import ReplacedTensors


@pytest.fixture
def source(tmp_path: Path) -> CheckpointFolder:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "notes.txt").write_text("notes")
    tensors = {"norm.weight": torch.arange(7, dtype=torch.bfloat16), "other": torch.arange(5, dtype=torch.float32)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    return CheckpointFolder.open(tmp_path)


def test_replaced_tensors_are_read_whole_and_in_pieces(source: CheckpointFolder) -> None:
    new = torch.linspace(0, 1, 14, dtype=torch.bfloat16)[::2]
    view = ReplacedTensors(source=source, replacements={"norm.weight": new})
    assert torch.equal(view.read("norm.weight"), new)
    chunks = list(view.read_chunks("norm.weight", 4))
    assert [chunk.numel() for chunk in chunks] == [4, 4, 4, 2]
    assert torch.equal(torch.cat(chunks).view(torch.bfloat16), new)
    view.read("norm.weight").zero_()
    assert torch.equal(view.read("norm.weight"), new)


def test_everything_else_is_the_source(source: CheckpointFolder) -> None:
    view = ReplacedTensors(source=source, replacements={"norm.weight": torch.ones(7, dtype=torch.bfloat16)})
    assert torch.equal(view.read("other"), source.read("other"))
    assert torch.equal(torch.cat(list(view.read_chunks("other"))), torch.cat(list(source.read_chunks("other"))))
    assert view.info("norm.weight") == source.info("norm.weight")
    assert (view.path, view.config, view.tensors, view.side_files) == (
        source.path,
        source.config,
        source.tensors,
        source.side_files,
    )


@pytest.mark.parametrize("tensor", [torch.ones(7), torch.ones(6, dtype=torch.bfloat16)], ids=["dtype", "shape"])
def test_another_dtype_or_shape_is_refused(tensor: torch.Tensor, source: CheckpointFolder) -> None:
    with pytest.raises(ValueError, match=r"^norm\.weight: "):
        ReplacedTensors(source=source, replacements={"norm.weight": tensor})
