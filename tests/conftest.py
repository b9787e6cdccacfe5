"""Fixtures of every test: uninitialised memory is NaN; `device` is each kind there is."""

import os

import pytest
import torch

# before huggingface_hub reads it: no test asks the real hub; tests/hub_server.py is asked instead
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch):
    """Whoever reads what torch.empty left must see it, on every run rather than on a bad day."""

    def fill_after(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            # under no_grad: the tensor may be a leaf that wants a gradient
            with torch.no_grad():
                return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", fill_after(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill_after(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill_after(torch.Tensor.new_empty))
