"""A coordinator with keys: TLS everywhere, and only whoever has keys takes part, also those who were admitted while it runs."""

from __future__ import annotations

from pathlib import Path

from federating import Coordinator, events, processes_of, supernode, until

from seedbed.server.keys import Authority


def notes(out: Path) -> str:
    return (out / "logs" / "coordinator.log").read_text() if (out / "logs" / "coordinator.log").exists() else ""


def test_who_is_admitted_while_it_runs_joins_and_who_is_revoked_is_shut_out(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    authority = Authority.create(keys)
    for name in ("alice", "carol"):
        authority.participant(name)
    coordinator = Coordinator(tmp_path / "run", keys=keys)
    out, nodes = coordinator.out, []

    def join(name: str, task: str) -> None:
        folder = keys / "participants" / name
        nodes.append(supernode(tmp_path, task, coordinator.port, coordinator.registry_port, keys=folder, name=name))

    try:
        assert until(lambda: "alice may join" in notes(out) and "carol may join" in notes(out)), coordinator.said
        join("alice", "addition")
        assert until(lambda: bool(events(out, "node"))), coordinator.said
        authority.participant("bob")
        authority.revoke("carol")
        assert until(lambda: "bob may join" in notes(out) and "carol is shut out" in notes(out)), notes(out)[-2000:]
        join("bob", "antonym")
        assert coordinator.wait() == 0, coordinator.said
        assert {event.node for event in events(out, "node")} == {"alice", "bob"}
        assert "--keys FOLDER" in coordinator.said
        assert until(lambda: not processes_of(out), 60)
    finally:
        coordinator.stop()
        for node in nodes:
            node.stop()
