"""Worker entry: what Ray Train runs on each worker."""

from treerpo_ray.task import WorkerTask


def run_worker(settings: dict[str, WorkerTask]) -> None:
    """What each worker runs; Ray Train hands over a dict.

    Ray's own actors of a trainer import this module, too: what only a worker needs is imported
    here.
    """
    task = settings["task"]
    task.check_node()

    from treerpo_ray.train import train

    train(task)
