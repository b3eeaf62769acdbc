"""The rewards, one scorer a file; each is a `raftdiff.protocols.Reward`."""
