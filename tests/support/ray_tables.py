"""What Ray's dashboard shows, read from the tables behind it: there need not be a dashboard."""

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import common_pb2, gcs_pb2, gcs_service_pb2
from ray.core.generated import gcs_service_pb2_grpc as services


def _ask(service: str, method: str, **fields: object) -> object:
    with init_grpc_channel(ray.get_runtime_context().gcs_address) as channel:
        stub = getattr(services, f"{service}GcsServiceStub")(channel)
        request = getattr(gcs_service_pb2, f"{method}Request")(**fields)
        return getattr(stub, method)(request, timeout=600)


def actors() -> list[dict[str, str]]:
    """Name, class, what it calls itself, state and the reason of its death, of each actor."""
    found = []
    for table in _ask("ActorInfo", "GetAllActorInfo").actor_table_data:
        cause = table.death_cause.actor_died_error_context
        found.append(
            {
                "name": table.name,
                "class": table.class_name,
                "repr": table.repr_name,
                "state": gcs_pb2.ActorTableData.ActorState.Name(table.state),
                "reason": common_pb2.ActorDiedErrorContext.Reason.Name(cause.reason)
                if table.HasField("death_cause")
                else "",
                "told": cause.error_message,
            }
        )
    return found


def failed_tasks() -> list[tuple[str, str]]:
    """Name and error of each task that is shown as failed."""
    failed = common_pb2.TaskStatus.FAILED
    return [
        (events.task_info.name, events.state_updates.error_info.error_message)
        for events in _ask("TaskInfo", "GetTaskEvents").events_by_task
        if failed in events.state_updates.state_ts_ns
    ]


def jobs() -> list[dict[str, str]]:
    """What is told of each job."""
    return [dict(job.config.metadata) for job in _ask("JobInfo", "GetAllJobInfo").job_info_list]
