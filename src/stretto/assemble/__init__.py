"""Plan + model -> the modules, units and stages of this rank."""
