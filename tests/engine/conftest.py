"""One undisturbed run with each driver, which the tests of this folder share."""

import json

import pytest
import torch
from runs import finish, lazy_words, same, saved, start, yaml_words


class Reference:
    """A run that nobody disturbs, and the words that start it anew."""

    def __init__(self, words, folder):
        self.words, self.out = words, folder / "whole"
        self.out.mkdir()
        assert self.finish(self.out) == 0, self.log_of(self.out)[-3000:]
        self.final = saved(self.out / "model_final.pth")

    def finish(self, out, *opts, fault=None, **options):
        return finish(self.words(out, *opts, **options), out / "out.txt", fault)

    def start(self, out, **options):
        return start(self.words(out, **options), out / "out.txt")

    def log_of(self, out):
        return (out / "out.txt").read_text()

    def weights(self):
        return torch.load(self.out / "model_final.pth", weights_only=True)["model"]

    def results(self):
        return json.loads((self.out / "results.json").read_text())

    def resumes(self, out, **options):
        """Whether the run in a folder goes on to the same end, bit by bit."""
        assert self.finish(out, resume=True, **options) == 0, self.log_of(out)[-3000:]
        return same(out / "model_final.pth", self.final)


@pytest.fixture(scope="session")
def few_images(few_shapes):
    """The embedded data set with a few images alone, in this process and in those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", few_shapes)
        patch.setenv("OMP_NUM_THREADS", "1")  # sums in one order
        yield


@pytest.fixture(scope="session")
def yaml(tmp_path_factory, few_images):
    return Reference(yaml_words, tmp_path_factory.mktemp("yaml"))


@pytest.fixture(scope="session")
def lazy(tmp_path_factory, few_images):
    return Reference(lazy_words, tmp_path_factory.mktemp("lazy"))


@pytest.fixture(params=["yaml", "lazy"])
def reference(request):
    return request.getfixturevalue(request.param)
