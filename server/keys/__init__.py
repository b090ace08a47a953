"""Who may take part: a certificate authority of the federation's own, its certificates, and Flower's node keys."""

from seedbed.server.keys.authority import Authority
from seedbed.server.keys.directory import Participant, expiry_warnings, node_keys, participants
from seedbed.server.keys.revocation import is_revoked

__all__ = ["Authority", "Participant", "expiry_warnings", "is_revoked", "node_keys", "participants"]
