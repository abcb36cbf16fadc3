"""The errors a person reads: each names the setting, its value, what is allowed and what to do."""

PREFIX = "Hires Lab: "


class HiresError(Exception):
    """Base of every error that Hires Lab raises on purpose; its text is meant for the user."""

    def __init__(self, message: str):
        super().__init__(message if message.startswith(PREFIX) else f"{PREFIX}{message}")


class SettingError(HiresError, ValueError):
    """A setting has a wrong name or a wrong value.

    `setting` is its name, `value` what was given, `allowed` the allowed range in words.
    """

    def __init__(self, setting: str, value: object, allowed: str, advice: str = ""):
        self.setting, self.value, self.allowed = setting, value, allowed
        shown = repr(value) if isinstance(value, str) else value
        advice = f" {advice}" if advice else ""
        super().__init__(f"'{setting}' is {shown}, must be {allowed}.{advice}")


class UnknownSetting(SettingError):
    """A name that is no setting of what it was given to."""

    def __init__(self, setting: str, value: object, owner: str, names: list[str], close: list[str]):
        guess = f" Did you mean '{close[0]}'?" if close else ""
        self.setting, self.value, self.allowed = setting, value, "one of " + ", ".join(names)
        HiresError.__init__(
            self, f"'{setting}' (given as {value!r}) is not a setting of {owner}.{guess} It has: {', '.join(names)}."
        )


class UnsupportedModel(HiresError, TypeError):
    """The network is not one that the chosen method can change."""


class Conflict(HiresError, ValueError):
    """Two things were asked for that cannot be had together."""
