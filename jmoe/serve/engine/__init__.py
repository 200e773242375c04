"""Continuous batching: requests that come and go, each with its own adapter and sampling, on one model."""

from jmoe.serve.engine.engine import Engine as Engine
from jmoe.serve.engine.request import MOST_BIASES as MOST_BIASES
from jmoe.serve.engine.request import MOST_LOGPROBS as MOST_LOGPROBS
from jmoe.serve.engine.request import Cancelled as Cancelled
from jmoe.serve.engine.request import EngineStoppedError as EngineStoppedError
from jmoe.serve.engine.request import Event as Event
from jmoe.serve.engine.request import Failed as Failed
from jmoe.serve.engine.request import Finished as Finished
from jmoe.serve.engine.request import LoadFailedError as LoadFailedError
from jmoe.serve.engine.request import NameTakenError as NameTakenError
from jmoe.serve.engine.request import NoPlaceError as NoPlaceError
from jmoe.serve.engine.request import PromptLogprobs as PromptLogprobs
from jmoe.serve.engine.request import PromptToken as PromptToken
from jmoe.serve.engine.request import QueueFullError as QueueFullError
from jmoe.serve.engine.request import Request as Request
from jmoe.serve.engine.request import SamplingParams as SamplingParams
from jmoe.serve.engine.request import Token as Token
from jmoe.serve.engine.request import TooLongError as TooLongError
from jmoe.serve.engine.request import UnknownAdapterError as UnknownAdapterError
from jmoe.serve.engine.settings import EngineSettings as EngineSettings
from jmoe.serve.engine.settings import EngineStats as EngineStats

__all__ = [
    "MOST_BIASES",
    "MOST_LOGPROBS",
    "Cancelled",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "EngineStoppedError",
    "Event",
    "Failed",
    "Finished",
    "LoadFailedError",
    "NameTakenError",
    "NoPlaceError",
    "PromptLogprobs",
    "PromptToken",
    "QueueFullError",
    "Request",
    "SamplingParams",
    "Token",
    "TooLongError",
    "UnknownAdapterError",
]
