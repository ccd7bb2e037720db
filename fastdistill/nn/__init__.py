"""`torch.nn.Module` drop-ins over the functions."""

from fastdistill.nn.distilbert import DistilBertLoss, DistilBertLossParts
from fastdistill.nn.hint import HintLosses, HintLossesParts
from fastdistill.nn.kd import KDLoss

__all__ = ["DistilBertLoss", "DistilBertLossParts", "HintLosses", "HintLossesParts", "KDLoss"]
