"""Actors of a run that are no actors: what is called of them answers at once."""

from treerpo_ray.task import RunActors


class AnsweringAtOnce(RunActors):
    """Stand-ins whose `remote` gives the answer itself."""

    def get(self, ref: object) -> object:
        return ref
