"""From the name in a request to the model that answers it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.core.discovery import Model, VersionKey
from services.core.errors import BackendUnavailable, InvalidInput, ModelNotFound, VersionNotServed
from services.inference.served import Served


class Routing:
    """`models` is the registry's view, None until there is one; `served` what this replica has ready."""

    def __init__(
        self, models: Callable[[], Mapping[str, Model] | None], served: Mapping[VersionKey, Served]
    ) -> None:
        self._models = models
        self._served = served

    def known(self) -> Mapping[str, Model]:
        """All models of the registry by name. Raises BackendUnavailable."""
        models = self._models()
        if models is None:
            raise BackendUnavailable("this replica has not heard from the registry yet")
        return models

    def model(self, name: str, version: str = "") -> Served:
        """The model "name", or "name@version" with the number or name of a version. `version` is what the
        gateway has chosen. Raises InvalidInput, ModelNotFound, VersionNotServed or BackendUnavailable."""
        name, _, wanted = name.partition("@")
        if not name:
            raise InvalidInput("model", "is required; `lingqu models list` shows the names")
        known = self.known().get(name)
        number = int(version) if version.isdigit() else known.traffic if known else 0
        if known is None or not number:
            raise ModelNotFound(name[:64])
        if wanted and not version:
            number = int(wanted) if wanted.isdigit() else known.aliases.get(wanted, 0)
            if not number:
                raise VersionNotServed(name, wanted[:32])
        served = self._served.get(VersionKey(name, number))
        if served is None:
            raise BackendUnavailable(f'version {number} of "{name}" is being loaded on this replica')
        return served

    def labels(self, key: VersionKey) -> Mapping[str, str]:
        """Those that the version has in the registry."""
        known = (self._models() or {}).get(key.model)
        versions = () if known is None else known.versions
        return next((version.labels for version in versions if version.key == key), {})
