"""Stand-in for transformers' export tests: every model exports, and the exported program computes the same."""

import torch


class ExportTesterMixin:
    def test_torch_export(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            with torch.no_grad():
                expected = model(**inputs)
                exported = torch.export.export(model, (), inputs, strict=False).module()(**inputs)
            torch.testing.assert_close(exported.to_tuple(), expected.to_tuple())
