#include "ssd_backward.h"
