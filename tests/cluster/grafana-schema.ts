// What a dashboard of ours may be: Grafana's own types, narrowed to the panels that we use and to queries of Prometheus.
// grafana-schema.txt says how grafana-schema.json is made of it.

import type { DataQuery } from './node_modules/@grafana/schema/dist/types/common/common.gen';
import type * as bargauge from './node_modules/@grafana/schema/dist/types/raw/composable/bargauge/panelcfg/x/types.gen';
import type * as raw from './node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen';
import type * as stat from './node_modules/@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/types.gen';
import type * as timeseries from './node_modules/@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen';

// Data sources add to @grafana/schema's DataQuery. These are the fields that the one for Prometheus has.
interface PrometheusQuery extends DataQuery {
  expr: string;
  format?: 'time_series' | 'table' | 'heatmap';
  instant?: boolean;
  range?: boolean;
  legendFormat?: string;
  interval?: string;
}

// It reads these of an annotation beside its query.
interface Annotation extends Omit<raw.AnnotationQuery, 'target'> {
  expr: string;
  titleFormat?: string;
  textFormat?: string;
  tagKeys?: string;
  step?: string;
}

interface Panel<Type, Options, Custom> extends Omit<raw.Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> {
  type: Type;
  id: number;
  options: Partial<Options>;
  fieldConfig: Omit<raw.FieldConfigSource, 'defaults'> & { defaults: Omit<raw.FieldConfig, 'custom'> & { custom?: Custom } };
  targets: PrometheusQuery[];
}

type AnyOfOurs =
  | Panel<'timeseries', timeseries.Options, timeseries.FieldConfig>
  | Panel<'stat', stat.Options, Record<string, never>>
  | Panel<'bargauge', bargauge.Options, Record<string, never>>;

// Only rows that are folded up hold panels; ours are open.
interface Row extends Omit<raw.RowPanel, 'panels'> {
  collapsed: false;
  panels: [];
}

export interface Dashboard extends Omit<raw.Dashboard, 'panels' | 'annotations' | 'templating'> {
  panels: (AnyOfOurs | Row)[];
  annotations: { list: Annotation[] };
  templating: { list: raw.VariableModel[] };
}
