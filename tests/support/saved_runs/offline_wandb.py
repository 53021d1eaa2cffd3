"""Records that W&B keeps of an offline run, by their kind."""

from wandb.proto.wandb_internal_pb2 import ArtifactRecord, MetricRecord, Record, RunRecord


def runs(records: list[Record]) -> list[RunRecord]:
    """What they say of the run."""
    return [record.run for record in records if record.WhichOneof("record_type") == "run"]


def metrics(records: list[Record]) -> list[MetricRecord]:
    """How metrics are to be drawn."""
    return [record.metric for record in records if record.WhichOneof("record_type") == "metric"]


def artifacts(records: list[Record]) -> dict[str, ArtifactRecord]:
    """The newest of each type."""
    found = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    return {artifact.type: artifact for artifact in found}
