#include "mamba_step.h"
