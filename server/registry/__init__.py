"""The adapter registry of a deployed federation: its store over gRPC, resumable, verified, within quotas."""
