"""Tests run the same on a machine with GPUs and without; benchmarks take what they find."""

import os


def pytest_configure(config):
    if not config.getoption("--run-gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
