"""Slot rules: what each torch function does with structured weights, one family of functions in each file."""

from . import attention as attention
from . import convolution as convolution
from . import embedding as embedding
from . import products as products
from . import views as views
