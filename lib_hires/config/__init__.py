"""Settings: dataclasses with a schema, their validation and their written forms. Pure data, no torch."""

from .common import Common
from .errors import Conflict, HiresError, SettingError, UnknownSetting, UnsupportedModel
from .settings import AUTO, Setting, Settings, schema, setting

__all__ = [
    "AUTO",
    "Common",
    "Conflict",
    "HiresError",
    "Setting",
    "SettingError",
    "Settings",
    "UnknownSetting",
    "UnsupportedModel",
    "schema",
    "setting",
]
