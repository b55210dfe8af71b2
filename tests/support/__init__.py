"""What tests share: pictures, slides, feature files, a viewer."""
