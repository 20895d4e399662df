"""One thread for all tests, no deadline for hypothesis (nothing is timed), and `gpu` tests only where CUDA is."""

import os
from functools import partial

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # a tiny forward on a busy machine: 9 ms with one thread, 560 ms with all
settings.register_profile("transfusion", deadline=None)
settings.load_profile("transfusion")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache, but for what was fetched into it by hand."""
    if "TRANSFUSION_CACHE" not in os.environ:
        os.environ["TRANSFUSION_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """Those that are compiled from here on, by a compiler that runs them as they are."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield found
    torch.compiler.reset()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not "in keywords", which has the parameters of tests too
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
