#include "selective_scan.h"
