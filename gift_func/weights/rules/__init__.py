"""What each torch function does with a structured weight: one family of functions a file."""

from . import attention as attention
from . import convolution as convolution
from . import embedding as embedding
from . import products as products
from . import views as views
