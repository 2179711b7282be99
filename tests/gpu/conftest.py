"""Tests that need a GPU: `make gpu` runs them. Their logic runs on the host in the other tests."""

import pytest
import torch

KEPT = 2**32  # bytes that a process may keep for its next test; the others run beside it


class AtOnce:
    """Prints a failure when it happens: what ends the tests early loses none."""

    def __init__(self, reporter):
        self.reporter = reporter

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.reporter.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


def pytest_configure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # the processes of pytest-xdist have none
        config.pluginmanager.register(AtOnce(reporter))


@pytest.fixture(autouse=True)
def _free():
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()
