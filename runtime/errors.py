"""What a user's input can be refused with. Every message is one sentence for the person who gave it."""


class InputError(ValueError):
    """Something given from outside cannot be used; the command line prints the message and exits with 2."""


class BundleError(InputError):
    """A bundle that is damaged, foreign, or of another format version."""


class PictureError(InputError):
    """A picture that is missing, damaged, empty or too large."""


class PictureWarning(UserWarning):
    """A picture is used although its file is not complete."""


class QuestionError(InputError):
    """A question that is empty, or too long for the model's context."""


class EngineError(InputError):
    """No inference library is installed, or the model is closed or belongs to another process."""


class ModelError(InputError):
    """A model whose numbers cannot be used."""


class BusyError(InputError):
    """Too many questions wait already."""


class DeviceError(InputError):
    """A device that is not there, lacks a library, or does not run the bundle."""
