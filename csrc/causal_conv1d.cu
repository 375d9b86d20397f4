#include "causal_conv1d.h"
