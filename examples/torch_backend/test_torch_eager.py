"""The conformance suite of dsc, run on this backend: `pytest` in this folder, once it is installed (`pip install -e .`)."""

from dsc.testing.conformance import Conformance


class TestTorchEager(Conformance):
    backend = "torch-eager"
