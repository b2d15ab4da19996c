"""What a model makes of texts: likelihoods of answers."""

from emarecipes.models.likelihoods import row_nll

__all__ = ["row_nll"]
