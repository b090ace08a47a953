"""Loaded into participants' processes by PYTHONPATH: spoils one thing when it is told to, and is invisible otherwise.

What is wanted stands in the directory that SEEDBED_SABOTEUR names: a file called after the deed is taken away by the first
process that finds it, and that process does it, once.

    wrong-digest    an answer names an adapter that nobody has handed in
    nan             what was trained has a value that is not a number, under digests that fit
    twice-reply     an answer is pushed to the SuperLink twice
    twice-submit    an adapter is handed in twice
    twice-done      a training tells twice that it is done
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

_PLACE = os.environ.get("SEEDBED_SABOTEUR", "")


def told(deed):
    """Whether this very process shall do it now."""
    try:
        os.rename(Path(_PLACE) / deed, Path(_PLACE) / f"{deed}.done-{os.getpid()}")
    except OSError:
        return False
    return True


def _jobs(module):
    perform = module.perform

    def spoiled(job, node, deadline=None):
        result = perform(job, node, deadline)
        return result.model_copy(update={"digest": "0" * 64}) if result.digest and told("wrong-digest") else result

    module.perform = spoiled


def _outcome(module):
    write = module.write_result

    def spoiled(spec, trained):
        if told("nan"):
            for factors in trained.value.values():
                factors.A[0, 0] = float("nan")
                break
        return write(spec, trained)

    module.write_result = spoiled


def _fleet(module):
    client = module.FleetHttpClient
    push = client.PushMessages

    def twice(self, request):
        if told("twice-reply"):
            push(self, request)
        return push(self, request)

    client.PushMessages = twice


def _registry(module):
    client = module.RegistryClient
    submit = client.submit

    def twice(self, directory, on_bytes=None):
        digest = submit(self, directory, on_bytes)
        return submit(self, directory, on_bytes) if told("twice-submit") else digest

    client.submit = twice


def _worker(module):
    events = module._events

    def doubled(stream):
        emit = events(stream)

        def told_twice(event):
            emit(event)
            if event.get("event") == "done" and told("twice-done"):
                emit(event)

        return told_twice

    module._events = doubled


_DEEDS = {
    "seedbed.client.jobs": _jobs,
    "seedbed.client.outcome": _outcome,
    "seedbed.client.registry": _registry,
    "seedbed.client.worker": _worker,
    "flwr.supernode.fleet_http_client": _fleet,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, inner, change):
        self.inner, self.change = inner, change

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        self.change(module)

    def get_code(self, name):  # for `python -m`
        return self.inner.get_code(name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in _DEEDS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, _DEEDS[name])
                return spec
        return None


if _PLACE:
    sys.meta_path.insert(0, _Finder())
