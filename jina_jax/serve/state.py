"""How far the server is: loading, ready, draining or dead."""

from dataclasses import dataclass, field

from .metrics import Metrics
from .options import ServeOptions
from .service import Service


@dataclass
class State:
    """What the routes, the signals and the loading thread share.

    Attributes:
        service: the loaded model; None until every program is compiled.
        draining: the server was told to end.
        failure: what kept the model from being loaded.
    """

    options: ServeOptions
    metrics: Metrics = field(default_factory=Metrics)
    service: Service | None = None
    draining: bool = False
    failure: BaseException | None = None

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send requests."""
        return self.service is not None and not self.draining and self.alive

    @property
    def alive(self) -> bool:
        """Whether the process can still do its work, or get to it."""
        return self.failure is None and (self.service is None or self.service.batcher.is_alive)
